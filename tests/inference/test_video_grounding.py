"""Things in videos are found, distinguished and followed from frame to frame."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    SamConfig,
    SamModel,
    SamProcessor,
)

import hfvlm
from hfvlm.inference.detection import BoxSegmenter, Detection, confirmed, cut_out, distinct, meant, overlap
from hfvlm.inference.video_grounding import Track, VideoGrounder, draw_tracks, find_scenes, tracks_at

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def colored(pictures, things):
    """A detector of colours: the box around all pixels of each."""
    found = []
    for image in pictures:
        pixels = np.asarray(image)
        every = []
        for thing in things:
            rows, columns = np.nonzero((pixels == COLORS[thing]).all(axis=-1))
            if len(rows):
                box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                every.append(Detection(thing, len(rows) / pixels[..., 0].size, [float(value) for value in box]))
        found.append(every)
    return found


def video_of(*frames, size=(60, 80)):
    """Frames of squares: {"red": (left, top, edge)}."""
    video = np.zeros((len(frames), *size, 3), np.uint8)
    for frame, squares in zip(video, frames, strict=True):
        for name, (left, top, edge) in squares.items():
            frame[top : top + edge, left : left + edge] = COLORS[name]
    return video


def walk(count, start=0):
    """A red square that goes a pixel to the right a frame, and a blue one that stays."""
    return [{"red": (i + start, 10, 12), "blue": (50, 40, 8)} for i in range(count)]


class TestTracks:
    def test_an_object_is_tracked_between_the_sampled_frames(self):
        video, grounder = video_of(*walk(18)), VideoGrounder(colored, every=5, batch_size=2)
        tracks = grounder(video, ["red", "blue"], scenes=[range(18)])
        assert sorted(track.label for track in tracks) == ["blue", "red"]
        (red,) = (track for track in tracks if track.label == "red")
        assert list(red.found) == [0, 5, 10, 15, 17]
        for i in range(18):
            assert red.box_at(i) == pytest.approx([i, 10, i + 12, 22])
        assert red.box_at(18) is None
        assert tracks_at(tracks, 3)[0]["label"] in COLORS
        assert {place["label"] for place in tracks_at(tracks, 3)} == {"red", "blue"}

    def test_scenes_are_apart(self):
        video = video_of(*walk(10), *walk(10))
        tracks = VideoGrounder(colored)(video, ["red"], scenes=[range(10), range(10, 20)])
        assert [(track.first, track.last) for track in tracks] == [(0, 9), (10, 19)]
        assert [track.scene for track in tracks] == [range(10), range(10, 20)]

    @pytest.mark.parametrize(("gone", "expected"), [(1, 1), (2, 2)])
    def test_an_object_may_be_missed_once(self, gone, expected):
        shown = {"red": (10, 10, 12)}
        video = video_of(shown, shown, *[{}] * gone, shown, shown)
        tracks = VideoGrounder(colored, every=1, missed=1)(video, ["red"], scenes=[range(len(video))])
        assert len(tracks) == expected
        assert tracks[-1].last == len(video) - 1
        if expected == 1:
            assert tracks[0].box_at(2) == [10, 10, 22, 22]

    def test_an_object_that_leaps_is_another_object(self):
        video = video_of({"red": (0, 0, 12)}, {"red": (40, 40, 12)})
        tracks = VideoGrounder(colored, every=1)(video, ["red"], scenes=[range(2)])
        assert [track.last for track in tracks] == [0, 1]

    def test_two_objects_of_one_name_keep_their_own_tracks(self):
        def two(pictures, things):
            place = iter(range(start[0], start[0] + len(pictures)))
            start[0] += len(pictures)
            boxes = [[[i, 0, i + 10, 10], [i + 4, 0, i + 14, 10]] for i in place]
            return [[Detection("dog", 0.9 - 0.1 * j, list(map(float, b))) for j, b in enumerate(x)] for x in boxes]

        start = [0]
        tracks = VideoGrounder(two, every=1)(video_of(*[{}] * 4), ["dog"], scenes=[range(4)])
        assert [track.box_at(3) for track in tracks] == [[3, 0, 13, 10], [7, 0, 17, 10]]

    def test_so_many_at_a_time(self):
        tracks = VideoGrounder(colored, most=1)(video_of(*walk(6)), ["blue", "red"], scenes=[range(6)])
        assert [track.label for track in tracks] == ["red"]  # the likelier, here the larger

    def test_nothing_to_look_for(self):
        assert VideoGrounder(None)(video_of({}), []) == []

    def test_drawn(self):
        video = video_of(*walk(6))
        tracks = VideoGrounder(colored)(video, ["red"], scenes=[range(6)])
        (drawn,) = hfvlm.draw_tracks(video, tracks, frames=[3])
        assert drawn.getpixel((3, 16)) == (0xD5, 0x5E, 0x00)
        assert len(list(draw_tracks(video, tracks))) == 6


class TestDetections:
    def test_overlap(self):
        left, right = Detection("a", 1, [0, 0, 10, 10]), Detection("a", 1, [5, 0, 15, 10])
        assert overlap(left, left) == 1
        assert overlap(left, right) == pytest.approx(50 / 150)
        assert overlap(left, Detection("a", 1, [20, 20, 30, 30])) == 0
        assert overlap(Detection("a", 1, [1, 1, 1, 1]), Detection("a", 1, [1, 1, 1, 1])) == 0

    def test_the_likelier_of_two_that_overlap(self):
        boxes = ([0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 5])
        found = [Detection("a", score, box) for score, box in zip((0.5, 0.9, 0.6), boxes, strict=True)]
        assert [each.score for each in distinct(found, 0.8)] == [0.9, 0.6]

    def test_words_that_the_detector_puts_together(self):
        things = ["brown dog", "dog", "train track"]
        assert [meant(said, things) for said in ("brown dog", "dog", "track", "Brown", "cat", "")] == [
            *("brown dog", "dog", "train track", "brown dog"),
            *(None, None),
        ]

    def test_what_clip_denies_is_left_out(self):
        class Classifier:
            labels = ("red", "blue")

            def scores(self, crops):
                return np.array([np.asarray(crop).mean(axis=(0, 1))[[0, 2]] / 255 for crop in crops])

            def predict(self, crops):
                rows = self.scores(crops)
                return [[(self.labels[row.argmax()], float(row.max() / row.sum()))] for row in rows]

        image = Image.fromarray(video_of({"red": (0, 0, 10), "blue": (20, 0, 10)})[0])
        right, wrong = Detection("red", 1, [0, 0, 10, 10]), Detection("red", 1, [20, 0, 30, 10])
        faint = Detection("red", 1, [0, 0, 40, 40])
        assert confirmed(image, [right, wrong, faint], Classifier()) == [right]
        assert confirmed(image, [], None) == []

    def test_what_is_outside_of_the_mask_is_black(self):
        image = Image.new("RGB", (20, 10), "white")
        mask = np.zeros((10, 20), bool)
        mask[2:5, 3:6] = True
        part = np.asarray(cut_out(image, Detection("a", 1, [2.5, 1.2, 7.1, 6.0], mask)))
        assert part.shape == (5, 6, 3)
        assert part.sum() == 9 * 3 * 255
        assert cut_out(image, Detection("a", 1, [20, 10, 20, 10])).size == (1, 1)


class TestScenes:
    def test_cuts(self):
        random = np.random.RandomState(0)
        scenes = [np.full((48, 64, 3), color) for color in ((220, 220, 30), (30, 30, 120), (30, 220, 30))]
        video = np.concatenate([np.repeat(scene[None], 20, axis=0) for scene in scenes])
        video = np.clip(video + random.randint(-4, 5, video.shape), 0, 255).astype(np.uint8)
        assert find_scenes((video, 10.0)) == [range(20), range(20, 40), range(40, 60)]
        assert find_scenes(video[:20]) == [range(20)]

    def test_the_whole_way(self):
        video = np.concatenate([video_of(*walk(20)), 255 - video_of(*[{}] * 20)])
        video[20:, 5:15, 5:15] = COLORS["blue"]
        tracks = VideoGrounder(colored)((video, 10.0), ["red", "blue"])
        assert [(t.label, t.first, t.last) for t in tracks] == [("red", 0, 19), ("blue", 0, 19), ("blue", 20, 39)]

    def test_without_pyscenedetect(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "scenedetect", None)
        with pytest.raises(ImportError, match=r"pip install 'hfvlm\[scenes\]'"):
            find_scenes(video_of({}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A GroundingDINO and a SAM that know nothing, as folders."""
    reason = "this version of transformers reads pictures for {} with torchvision alone"
    dino, sam_images = (
        pytest.importorskip(f"transformers.models.{name}.image_processing_pil_{name}", reason=reason.format(name))
        for name in ("grounding_dino", "sam")
    )
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "brown", "ball", ".", "?"]
    backbone = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    backbone |= {"window_size": 2, "image_size": 32, "out_indices": [2, 3, 4]}
    text = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "vocab_size": len(words)}
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 4, "encoder_ffn_dim": 16}
    sizes |= {"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = GroundingDinoConfig(backbone_config=backbone, text_config=text, **sizes)
    folder = tmp_path_factory.mktemp("models")
    GroundingDinoForObjectDetection(config).save_pretrained(folder / "detector")
    images = dino.GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 128})
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder / "detector")
    vision = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {
        "image_size": 32,
        "patch_size": 8,
        "window_size": 2,
        "global_attn_indexes": [0],
        "mlp_dim": 16,
        "num_pos_feats": 4,
    }
    prompts = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 8,
        "mlp_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
    }
    sam = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    SamModel(sam).save_pretrained(folder / "segmenter")
    images = sam_images.SamImageProcessorPil(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32})
    SamProcessor(images).save_pretrained(folder / "segmenter")
    return folder


class TestModels:
    """transformers' own classes, with weights that know nothing: what goes in and what comes out."""

    def test_from_folders_to_tracks(self, models, clip_folder):
        grounder = VideoGrounder.from_pretrained(models / "detector", segmenter=models / "segmenter", threshold=0.0)
        video = video_of(*walk(6))
        tracks = grounder(video, ["Brown dog", "ball"], scenes=[range(6)])
        assert tracks
        for track in tracks:
            assert track.label in ("Brown dog", "ball")
            for found in track.found.values():
                left, top, right, bottom = found.box_xyxy
                assert 0 <= left <= right <= 80
                assert 0 <= top <= bottom <= 60
                assert found.mask.shape == (60, 80)
                assert found.mask.dtype == bool
        asked = VideoGrounder.from_pretrained(models / "detector", embedder=clip_folder, threshold=0.0)
        assert isinstance(asked(video, ["dog", "ball"], scenes=[range(6)]), list)
        assert (
            VideoGrounder.from_pretrained(models / "detector", threshold=1.0)(video, ["dog"], scenes=[range(6)]) == []
        )

    def test_a_batch_equals_its_images(self, models):
        detector = VideoGrounder.from_pretrained(models / "detector", threshold=0.0).detector
        pictures = [Image.fromarray(frame) for frame in video_of(*walk(2))]
        together = detector(pictures, ["dog", "ball"])
        for image, found in zip(pictures, together, strict=True):
            (alone,) = detector([image], ["dog", "ball"])
            assert [each.label for each in alone] == [each.label for each in found]
            for left, right in zip(alone, found, strict=True):
                assert left.box_xyxy == pytest.approx(right.box_xyxy, abs=1e-3)

    def test_the_best_of_sams_masks(self, models):
        segmenter = BoxSegmenter.from_pretrained(models / "segmenter")
        image, boxes = Image.fromarray(video_of(*walk(1))[0]), [[0.0, 0.0, 40.0, 30.0], [20.0, 10.0, 80.0, 60.0]]
        inputs = segmenter.processor(images=image, input_boxes=[boxes], return_tensors="pt")
        with torch.no_grad():
            output = segmenter.model(pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"])
        (masks,) = segmenter.processor.post_process_masks(
            output.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        best = output.iou_scores[0].argmax(dim=-1)
        for i, mask in enumerate(segmenter(image, boxes)):
            assert np.array_equal(mask, masks[i, best[i]].numpy())


def test_a_track_of_one_frame():
    track = Track("a", range(9), {4: Detection("a", 1, [1, 2, 3, 4])})
    assert track.box_at(4) == [1, 2, 3, 4]
    assert track.box_at(3) is None
