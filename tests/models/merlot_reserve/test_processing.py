import numpy as np
import pytest
import torch
from PIL import Image

from hfvlm.media import MediaError
from hfvlm.models.merlot_reserve import (
    HfvlmMERLOTReserveFeatureExtractor,
    HfvlmMERLOTReserveImageProcessor,
    HfvlmMERLOTReserveProcessor,
    HfvlmMERLOTReserveTokenizer,
)
from hfvlm.models.merlot_reserve.framing import fitted_at_random, without_bars
from hfvlm.models.merlot_reserve.processing_merlot_reserve import ReserveSegment, centred_in_silence, spectrograms
from hfvlm.models.merlot_reserve.segments import around, texts_between
from tests.models.merlot_reserve.vocabulary import written_vocabulary

MASK, START, SOUND = 3, 1, 5
SIZE = {"height": 32, "width": 48}
RATE = 22_050


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    path = written_vocabulary(tmp_path_factory.mktemp("vocabulary") / "lowercase_encoder.json", 50)
    return HfvlmMERLOTReserveProcessor(
        HfvlmMERLOTReserveImageProcessor(size=SIZE),
        HfvlmMERLOTReserveTokenizer.from_vocabulary(path),
        HfvlmMERLOTReserveFeatureExtractor(),
    )


def tone(seconds, hertz=440.0):
    return (0.25 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def words(processor, ids):
    return processor.tokenizer.convert_ids_to_tokens([i for i in ids if i])


# Images


def test_images_are_fitted_at_the_top_left(processor):
    """Small ones are enlarged; what is left is black, below or on the right."""
    white = Image.new("RGB", (20, 10), "white")
    pixels = processor.image_processor(white, return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 32, 48)
    assert (pixels[:, :24] == 1).all()
    assert (pixels[:, 24:] == 0).all()
    tall = Image.new("RGB", (10, 20), "white")
    pixels = processor.image_processor(tall, return_tensors="pt")["pixel_values"][0]
    assert pixels[0].any(0).sum() == 16


def test_tall_images_are_turned(processor):
    """To the left, with four grey columns on each side before they are resized."""
    array = np.zeros((100, 60, 3), dtype=np.uint8)
    array[:, :30] = 255  # the left half comes to lie at the bottom
    pixels = processor.image_processor(array, turn_tall=True, return_tensors="pt")["pixel_values"][0]
    height = int(60 * 48 / 108)
    column = [0.0] * (height // 2) + [1.0] * (height - height // 2) + [0.0] * (32 - height)
    assert pixels[0, :, 24].round().tolist() == column
    assert pixels[0, height // 4, 0] == 0.5 == pixels[0, height // 4, -1]
    upright = processor.image_processor(Image.new("RGB", (30, 30)), turn_tall=True, return_tensors="pt")
    assert (upright["pixel_values"] == 0).all()


def test_random_scales_crop_where_the_image_is_larger():
    image = torch.linspace(0, 1, 64 * 64).reshape(1, 64, 64).repeat(3, 1, 1)
    whole = fitted_at_random(image, (64, 64), (1.0, 1.0), (0.0, 0.0, 0.0))
    torch.testing.assert_close(whole, image)
    larger = fitted_at_random(image, (64, 64), (2.0, 2.0), (0.0, 1.0, 1.0))
    assert larger[0, -1, -1] == pytest.approx(1.0, abs=1e-3)
    assert larger[0, 0, 0] > 0.45
    covered = fitted_at_random(image, (64, 64), (2.0, 2.0), (0.0, 0.0, 0.0), covers=True)
    torch.testing.assert_close(covered, image)


def test_black_bars_are_cut_up_to_a_fifth():
    frames = np.zeros((2, 100, 50, 3), dtype=np.uint8)
    frames[1, 10:70, 5:] = 40
    assert without_bars(frames) == (10, 80, 5, 50)
    assert without_bars(frames, threshold=41) == (20, 80, 10, 40)


def test_other_filters_are_refused():
    with pytest.raises(ValueError, match="bilinearly only"):
        HfvlmMERLOTReserveImageProcessor(resample=3)


# Audio


def test_a_tone_is_in_its_bin(processor):
    """Of 64 bins, equal in Slaney's mel from 20 Hz to 11,025 Hz; the last channel is the speed."""
    features = processor.feature_extractor((tone(5.0), RATE), return_tensors="pt")["input_features"]
    assert features.shape == (3, 60, 65)
    assert (features[..., 64] == 1).all()
    louder = processor.feature_extractor((tone(5.0) * 2, RATE), return_tensors="pt")["input_features"]
    torch.testing.assert_close(louder, features)
    peaks = features[..., :64].mean(dim=(0, 1)).argmax()
    lowest, highest = 3 * 20 / 200, 15 + 27 * np.log(11.025) / np.log(6.4)
    assert abs(int(peaks) - ((3 * 440 / 200 - lowest) / (highest - lowest) * 65 - 1)) < 1


def test_short_audio_is_in_the_middle_of_silence(processor):
    features = processor.feature_extractor((tone(1.0), RATE), return_tensors="pt")["input_features"]
    assert (features[0, :, :64] == 0).all()
    assert features[1, :, :64].max() > 1
    assert centred_in_silence(torch.ones(3), 6).tolist() == [0, 1, 1, 1, 0, 0]
    with pytest.raises(MediaError, match="203 frames, 188 are needed: 109956 to 110543 samples"):
        processor.feature_extractor((tone(5.4), RATE))


def test_other_lengths_have_other_frames():
    assert spectrograms(torch.zeros(180 * 588 - 1), gap=0).shape == (3, 60, 65)
    assert (spectrograms(torch.zeros(188 * 588 * 2 - 1), playback_speed=2)[..., 64] == 2).all()
    with pytest.raises(MediaError, match="make 187 frames"):
        spectrograms(torch.zeros(109955))


# Segments


def video(seconds=12, fps=4, hertz=(300.0, 3000.0)):
    """A video that is red, then blue, between black bars, and its audio: low, then high."""
    frames = np.zeros((seconds * fps, 40, 48, 3), dtype=np.uint8)
    half = len(frames) // 2
    frames[:half, 4:36, :, 0] = 200
    frames[half:, 4:36, :, 2] = 200
    sound = np.concatenate([tone(seconds / 2, pitch) for pitch in hertz])
    return (frames, float(fps)), (sound, RATE)


def test_a_video_is_cut_into_segments(processor):
    segments = processor.segments(*video())
    assert [(s.start, s.end) for s in segments] == [(0.0, 5.0), (5.0, 10.0)]
    assert [s.frame.shape for s in segments] == [(32, 48, 3)] * 2
    assert [s.frame[0, 0].tolist() for s in segments] == [[200, 0, 0], [0, 0, 200]]
    low, high = (s.clips[2, :, :64].mean(dim=0).argmax() for s in segments)
    assert low < high
    assert len(processor.segments(*video(), most=1)) == 1
    assert len(processor.segments(*video(), seconds=14 / 3, gap=0, sampling_rate=22_620)) == 2
    with pytest.raises(MediaError, match="5.0 s hold no segment of 5 s"):
        processor.segments(*video(5))
    with pytest.raises(ValueError, match="seconds"):
        processor.segments(*video(), seconds=-1)


def test_segments_are_joined(processor):
    segments = processor.segments(*video())
    segments[0].text = "a dog<|MASK|>"
    inputs = processor.join(segments, max_length=30)
    ids, places = inputs["input_ids"][0], inputs["audio_ids"][0]
    assert words(processor, ids[:3]) == ["a", "dog", "<|MASK|>"]
    assert (ids[3:21] == SOUND).all()
    assert places.tolist() == [0] * 3 + [3] * 6 + [4] * 6 + [5] * 6 + [-1] * 9
    assert inputs["segment_ids"][0].tolist() == [0] * 3 + [1] * 18 + [-1] * 9
    assert inputs["pixel_values"].shape == (1, 2, 3, 32, 48)
    assert (inputs["input_features"][0, :3] == 0).all()
    torch.testing.assert_close(inputs["input_features"][0, 3:], segments[1].clips)
    assert processor.join(segments, max_length=5)["input_ids"].shape == (1, 5)
    with pytest.raises(ValueError, match="9 segments; a video has 1 to 8"):
        processor.join(segments[:1] * 9)
    with pytest.raises(ValueError, match="Segment 0 has neither a text nor clips"):
        processor.join([ReserveSegment(segments[0].frame)])
    with pytest.raises(ValueError, match='"pt" or "np"'):
        processor.join(segments, return_tensors="tf")


# Questions


def test_questions_end_with_the_mask(processor):
    image = Image.new("RGB", (30, 20))
    inputs = processor.questions(
        [image], ["who is it?"], [["the dog", "a cat"]], [["person 1", "nothing"]], [1], max_length=14
    )
    assert inputs["input_ids"].shape == (1, 2, 2, 14)
    (first, second), (reason, _) = inputs["input_ids"][0]
    assert " ".join(words(processor, first)) == "who is it ? answer : the dog <|MASK|>"
    assert words(processor, second)[-3:] == ["a", "cat", "<|MASK|>"]
    assert " ".join(words(processor, reason)) == "who is it ? answer : a cat rationale : person 1 <|MASK|>"
    cut = processor.questions([image], ["who is it?"], [["the dog", "a cat"]], max_length=5)["input_ids"]
    assert cut.shape == (1, 2, 5)
    assert (cut[..., -1] == MASK).all()
    for wrong, reason in (
        ({"reasons": [["x", "y"]]}, "reasons need labels"),
        ({"answers": [["x", "y"], ["z", "w"]], "questions": ["who?"] * 2}, "1 images for 2 questions"),
        ({"reasons": [["x"]], "labels": [0]}, "as many answers"),
    ):
        given = {"images": [image], "questions": ["who?"], "answers": [["a", "b"]]} | wrong
        with pytest.raises(ValueError, match=reason):
            processor.questions(**given)


def test_questions_about_videos_have_subtitles_and_audio(processor):
    segments = processor.segments(*video(), seconds=14 / 3, gap=0, sampling_rate=22_620)
    segments[1].text = "a dog"
    inputs = processor.video_question(
        segments, "who is it?", ["the dog", "a cat"], (0.101, 0.5), max_length=80, num_segments=3
    )
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "input_ids": (1, 2, 80),
        "segment_ids": (1, 2, 80),
        "audio_input_ids": (1, 2, 80),
        "audio_segment_ids": (1, 2, 80),
        "pixel_values": (1, 3, 3, 32, 48),
        "input_features": (1, 9, 60, 65),
    }
    text = words(processor, inputs["input_ids"][0, 0])
    assert " ".join(text) == "10 to 50 <|START|> who is it ? answer : the dog <|MASK|> a dog"
    assert inputs["segment_ids"][0, 0, :15].tolist() == [0] * 13 + [2] * 2
    assert (inputs["audio_input_ids"] == SOUND).sum() == 2 * 3 * 18
    assert inputs["audio_segment_ids"][0, 0, 13:67].tolist() == [1] * 18 + [2] * 18 + [3] * 18
    assert (inputs["pixel_values"][0, 2] == 0).all()
    assert (inputs["input_features"][..., -1] == 1).all()
    assert (inputs["input_features"][0, 6:, :, :-1] == 0).all()
    with pytest.raises(ValueError, match="its clips of audio"):
        processor.video_question([ReserveSegment(segments[0].frame)], "who?", ["a", "b"])
    with pytest.raises(ValueError, match=r"a question is about 1 to 1 \(num_segments\)"):
        processor.video_question(segments, "who?", ["a", "b"], num_segments=1)


def test_a_moment_is_in_the_middle_of_segments(processor):
    """As TVQA's authors cut videos: on both sides as long as there is any video, from thirds of a second on."""
    starts, shares = around((8.0, 10.0), 20.0)
    assert starts == pytest.approx([-8 / 3, 2, 20 / 3, 34 / 3, 16])
    assert shares == pytest.approx((32 / 70, 38 / 70))
    assert around((8.0, 10.0), 20.0, 3)[0] == pytest.approx([2, 20 / 3, 34 / 3])
    long, shares = around(None, 60.0)
    assert len(long) == 7
    assert shares[0] < 0 < 1 < shares[1]  # the video is longer than seven segments
    for span, message in (((5.0, 4.0), "no time of a video of 20 s"), ((21.0, 22.0), "no time"), ((-1, 2), "span")):
        with pytest.raises(ValueError, match=message):
            around(span, 20.0)
    subtitles = [(1.0, 3.0, "in the\nfirst"), (3.0, 5.1, "second"), (4.0, 6.0, "again"), (40.0, 41.0, "after")]
    subtitles = [dict(zip(("start", "end", "text"), each, strict=True)) for each in subtitles]
    assert texts_between([-8 / 3, 2, 20 / 3], subtitles) == ["in the first", "second again", ""]
    with pytest.raises(ValueError, match="one has no end, text"):
        texts_between([0.0], [{"start": 1.0}])


def test_a_moment_s_segments_have_frames_audio_and_subtitles(processor):
    (frames, fps), (sound, rate) = video(20)
    frames[...] = np.arange(len(frames), dtype=np.uint8)[:, None, None, None]  # each frame is its number
    said = [{"start": 8.0, "end": 9.0, "text": "a dog"}]
    segments, shares = processor.moment((frames, fps), (sound, rate), span=(8.0, 10.0), subtitles=said)
    assert [segment.start for segment in segments] == pytest.approx([-8 / 3, 2, 20 / 3, 34 / 3, 16])
    assert [segment.text for segment in segments] == ["", "", "a dog", "", ""]
    # The nearest of three frames a second to each middle; the last one is that of 18.33 seconds.
    assert [int(segment.frame[0, 0, 0]) for segment in segments] == [0, 17, 36, 55, 73]
    assert segments[0].frame.shape == (40, 48, 3)  # whole, with its bars
    assert all(segment.clips.shape == (3, 60, 65) for segment in segments)
    assert (segments[0].clips[0, :40, :64] == 0).all()  # before the video there is silence
    assert segments[0].clips[2, :, :64].max() > 1
    assert (segments[4].clips[2, :, :64] == 0).any()  # and after it
    options = {"gap": 0, "sampling_rate": 22_620}
    own = processor.segments((frames, fps), (sound, rate), seconds=14 / 3, start=2.0, **options)[0]
    torch.testing.assert_close(segments[1].clips, own.clips)
    inputs = processor.video_question(segments, "who is it?", ["the dog", "a cat"], shares, max_length=200)
    assert inputs["pixel_values"].shape == (1, 7, 3, 32, 48)
    assert (inputs["segment_ids"][0, 0] == 3).sum() == 2


# Texts, and the whole


def test_texts_to_compare_are_cut(processor):
    encoded = processor(text=["the dog " * 20, "A Cat"])
    assert encoded["input_ids"].shape == (2, 15)
    assert words(processor, encoded["input_ids"][1].tolist()) == ["a", "cat"]
    assert encoded["attention_mask"][1].sum() == 2
    assert len(processor.ids("the dog " * 20)) == 40
    assert processor.ids([4, 5]) == [4, 5]


def test_the_processor_is_saved(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = HfvlmMERLOTReserveProcessor.from_pretrained(tmp_path)
    given = {"images": Image.new("RGB", (9, 9), "red"), "text": ["a cat"], "audio": (tone(2.0), RATE)}
    first, second = processor(**given), again(**given)
    assert set(first) == {"pixel_values", "input_ids", "attention_mask", "input_features"}
    for name, value in first.items():
        assert torch.equal(value, second[name])
    assert again.num_audio_tokens == 6
    with pytest.raises(ValueError, match="num_audio_tokens"):
        HfvlmMERLOTReserveProcessor(num_audio_tokens=0)
