"""Inputs of ImageBind beyond the golden cases, and whole folders of it."""

from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoModel, AutoProcessor, pipeline

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.conversion.imagebind import keys_for
from hfvlm.media import MediaError
from hfvlm.models.imagebind import (
    HfvlmImageBindDepthFeatureExtractor,
    HfvlmImageBindFeatureExtractor,
    HfvlmImageBindImageProcessor,
    HfvlmImageBindIMUFeatureExtractor,
    HfvlmImageBindProcessor,
    HfvlmImageBindThermalFeatureExtractor,
    HfvlmImageBindVideoFeatureExtractor,
)
from hfvlm.release.verification import samples, verify

WAVE = np.random.RandomState(0).uniform(-0.5, 0.5, 16_000 * 5).astype(np.float32)
IMAGES = np.random.RandomState(0).randint(0, 256, (2, 40, 60, 3), dtype=np.uint8)


@pytest.fixture
def folder(imagebind_folder):
    return imagebind_folder


def test_a_folder_is_whole(folder):
    checks = verify(folder)
    assert [check for check in checks if not check.passed] == []
    assert sum("alone equals" in check.name for check in checks) == 7


def test_the_processor_survives_a_round_trip(folder, tmp_path):
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is HfvlmImageBindProcessor
    assert processor.modalities == ("image", "video", "text", "audio", "depth", "thermal", "imu")
    processor.imu_feature_extractor.num_clips = 3
    processor.feature_extractor.num_clips = 2
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert (again.imu_feature_extractor.num_clips, again.feature_extractor.num_clips) == (3, 2)
    assert again.video_feature_extractor.size == 32
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is HfvlmImageBindFeatureExtractor


def test_everything_at_once_and_each_alone(folder):
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    names = {"image": "images", "video": "videos"}
    given = {names.get(m, m): samples(m) for m in processor.modalities}
    output = model(**processor(**given))
    assert output.modalities == processor.modalities
    for modality in model.modalities:
        inputs = processor.prepare(modality, samples(modality))
        alone = getattr(model, f"get_{modality}_features")(**inputs).pooler_output
        whole = output[f"{modality}_embeds"] * output[f"{modality}_scale"]
        assert torch.allclose(alone, whole, atol=1e-5), modality
    with pytest.raises(ValueError, match="needs one of images, text"):
        processor()
    assert processor(text="0", audio=(WAVE, 16_000), padding="max_length")["input_ids"].shape == (1, 24)
    with pytest.raises(TypeError, match="unexpected keyword argument 'loudness'"):
        processor(audio=(WAVE, 16_000), audio_kwargs={"loudness": 3})
    assert (
        processor(audio=WAVE, audio_kwargs={"sampling_rate": 16_000, "num_clips": 1})["input_features"].shape[1] == 1
    )


def test_a_dual_encoder_answers_the_same_questions(clip_folder):
    model, processor = AutoModel.from_pretrained(clip_folder), AutoProcessor.from_pretrained(clip_folder)
    assert model.modalities == processor.modalities == ("image", "text")
    for modality in model.modalities:
        inputs = processor.prepare(modality, samples(modality))
        assert getattr(model, f"get_{modality}_features")(**inputs).pooler_output.shape == (2, 64)
    with pytest.raises(ValueError, match="prepares image, text, not audio"):
        processor.prepare("audio", WAVE)


def test_the_pipeline(folder):
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    answers = classify(Image.fromarray(IMAGES[0]), candidate_labels=["0", "1", "2"])
    assert sum(answer["score"] for answer in answers) == pytest.approx(1)


def test_the_audio_pipeline(folder):
    classify = pipeline("zero-shot-audio-classification", model=str(folder))
    answers = classify(WAVE, candidate_labels=["0", "1", "2"])
    assert sum(answer["score"] for answer in answers) == pytest.approx(1)


def test_images_are_converted_before_they_are_resized():
    processor = HfvlmImageBindImageProcessor(size=32)
    palette = Image.fromarray(IMAGES[0]).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(processor(palette)["pixel_values"][0], processor(palette.convert("RGB"))["pixel_values"][0])


def frames_of(frames=10, size=(20, 30)):
    """Frames whose pixels are their number."""
    return np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, *size, 3))


def numbers(pixels, extractor):
    """The frames that were taken, of the first crop of each clip."""
    values = torch.from_numpy(pixels)[:: extractor.num_crops, 0, :, 0, 0]
    return ((values * extractor.image_std[0] + extractor.image_mean[0]) * 255).round().int().tolist()


def test_clips_of_a_video():
    extractor = HfvlmImageBindVideoFeatureExtractor(size=16)
    assert numbers(extractor((frames_of(10), 2.0))["pixel_values_videos"][0], extractor) == [
        [0, 3],
        [2, 5],
        [3, 6],
        [5, 8],
        [6, 9],
    ]
    # Shorter than a clip: every clip is the whole video.
    assert numbers(extractor((frames_of(3), 2.0))["pixel_values_videos"][0], extractor) == [[0, 2]] * 5
    # Without a rate, the frames are one clip; with less than a frame in a clip, the nearest is taken.
    assert numbers(extractor([frames_of(7)])["pixel_values_videos"][0], extractor) == [[0, 6]] * 5
    assert numbers(extractor((frames_of(4), 0.1))["pixel_values_videos"][0], extractor) == [
        [0, 0],
        [1, 1],
        [2, 2],
        [3, 3],
        [3, 3],
    ]
    single = extractor([frames_of(7)], num_crops=1, num_clips=1, num_frames=4, return_tensors="pt")[
        "pixel_values_videos"
    ]
    assert single.shape == (1, 1, 3, 4, 16, 16)
    with pytest.raises(ValueError, match="num_crops must be one of 1, 3"):
        extractor([frames_of()], num_crops=2)
    with pytest.raises(MediaError, match="too thin"):
        HfvlmImageBindVideoFeatureExtractor()([np.zeros((2, 1, 400_000, 3), np.uint8)])


def test_crops_of_a_video():
    extractor = HfvlmImageBindVideoFeatureExtractor(size=8, image_mean=[0.0] * 3, image_std=[1 / 255] * 3)
    wide = np.zeros((2, 8, 19, 3), np.uint8) + np.arange(19, dtype=np.uint8)[:, None]
    columns = extractor([wide])["pixel_values_videos"][0][:3, 0, 0, 0, 0]
    assert columns.round().tolist() == [0, 6, 11]  # the middle one rounds up
    tall = wide.swapaxes(1, 2)
    assert extractor([tall])["pixel_values_videos"][0][:3, 0, 0, 0, 0].round().tolist() == [0, 6, 11]


def test_audio_is_resampled_and_the_first_channel_is_read():
    extractor = HfvlmImageBindFeatureExtractor()
    stereo = np.stack([WAVE, WAVE * 0])
    features = extractor([(WAVE, 16_000), (WAVE[::2], 8_000), (stereo, 16_000)], return_tensors="pt")["input_features"]
    assert features.shape == (3, 3, 1, 128, 204)
    assert not torch.allclose(features[0], features[1], atol=1.0)
    one = extractor([(WAVE, 16_000), (stereo, 16_000)], num_clips=1, return_tensors="pt")["input_features"]
    assert torch.allclose(one[0], one[1], atol=1e-4)
    assert torch.all(features[..., 198:] == torch.tensor(4.268) / 9.138)
    with pytest.raises(MediaError, match="too short: at least 25 ms"):
        extractor((WAVE[:300], 16_000))
    with pytest.raises(TypeError, match="unexpected keyword argument 'loudness'"):
        extractor(WAVE, sampling_rate=16_000, loudness=3)


def test_reading_audio_does_not_change_it():
    before = WAVE.copy()
    HfvlmImageBindFeatureExtractor()((WAVE, 16_000))
    assert np.array_equal(WAVE, before)


def test_depth_becomes_normalised_disparity():
    extractor = HfvlmImageBindDepthFeatureExtractor(size=32)
    near, far = (extractor(np.full((48, 64), metres))["depth_values"][0] for metres in (1.0, 2.0))
    assert near.shape == (1, 32, 32)
    disparity = 0.075 * 518.857901
    assert np.allclose(near, (disparity - 0.0418) / 0.0295, rtol=1e-5)
    assert np.allclose(far, (disparity / 2 - 0.0418) / 0.0295, rtol=1e-5)
    # Nothing measured is infinitely far, and the farthest is cut.
    assert np.allclose(extractor(np.zeros((48, 64)))["depth_values"][0], -0.0418 / 0.0295)
    assert np.allclose(extractor(np.full((48, 64), 90.0))["depth_values"][0], (disparity / 50 - 0.0418) / 0.0295)
    other = extractor(np.full((48, 64), 1000, np.uint16), focal_length=600.0, baseline=0.095)["depth_values"][0]
    assert np.allclose(other, (57 - 0.0418) / 0.0295, rtol=1e-5)


def test_thermal_images_are_fitted():
    extractor = HfvlmImageBindThermalFeatureExtractor(size=20)
    values = extractor([IMAGES[0, ..., 0], np.full((40, 60), 25.0)], limits=(0, 50), return_tensors="pt")
    assert values["thermal_values"].shape == (2, 1, 20, 20)
    assert torch.allclose(values["thermal_values"][1], torch.tensor(0.5))
    raw = extractor(IMAGES[0, ..., 0])["thermal_values"][0]
    assert 0.3 < raw.mean() < 0.7
    assert np.allclose(
        extractor(IMAGES[0, ..., 0], mean=0.5, std=0.25)["thermal_values"][0], (raw - 0.5) / 0.25, atol=1e-6
    )


def test_motion_has_the_models_length():
    extractor = HfvlmImageBindIMUFeatureExtractor()
    trace = np.random.RandomState(0).standard_normal((6, 2400))
    assert extractor([(trace, 200), (trace.T, 400)], return_tensors="pt")["imu_values"].shape == (2, 6, 2000)
    assert extractor((trace, 200), num_clips=3, return_tensors="pt")["imu_values"].shape == (1, 3, 6, 2000)
    assert np.array_equal(extractor(trace, sampling_rate=400)["imu_values"][0], trace[:, 200:2200].astype(np.float32))


def test_urls_are_refused_unless_the_call_allows_them(folder, monkeypatch):
    processor = AutoProcessor.from_pretrained(folder)
    for name in ("images", "videos", "audio", "depth", "thermal", "imu"):
        with pytest.raises(MediaError, match="URLs are refused"):
            processor(**{name: "https://example.org/file"})
    asked = []
    monkeypatch.setattr("hfvlm.media.sources.urls.fetch", lambda url, hosts: asked.append((url, hosts)) or b"")
    for name in ("images", "videos", "audio", "depth", "thermal", "imu"):
        with pytest.raises(MediaError):
            processor(**{name: "https://example.org/file"}, allow_urls={"example.org"})
    assert asked == [("https://example.org/file", {"example.org"})] * 6


def test_a_checkpoint_converts(folder, tmp_path):
    """Through the released file's layout, both ways."""
    model = AutoModel.from_pretrained(folder)
    rows = keys_for(model.config)
    original = restore_keys(model.state_dict(), rows)
    original["modality_preprocessors.text.mask"] = torch.full((24, 24), -torch.inf).triu(1)
    torch.save(original, tmp_path / "imagebind_tiny.pth")
    arguments = {f"{tower}_num_heads": 2 for tower in ("vision", "text", "audio", "depth", "thermal", "imu")}
    arguments |= {"audio_num_mel_bins": 64, "audio_stride": 16}
    vocabulary = files("hfvlm.samples") / "clip-tiny" / "bpe_simple_vocab.txt.gz"
    out = hfvlm.convert(
        tmp_path / "imagebind_tiny.pth", "imagebind", tmp_path / "out", original=arguments, vocabulary=vocabulary
    )
    again = AutoModel.from_pretrained(out)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert again.config.licence == "unknown"
    with pytest.raises(ValueError, match="does not implement audio_colour"):
        hfvlm.convert(
            tmp_path / "imagebind_tiny.pth", "imagebind", tmp_path / "x", original=arguments | {"audio_colour": 1}
        )
