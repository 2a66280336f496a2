"""Inputs of LanguageBind beyond the golden cases, and its releases, alone and put together."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, pipeline
from typer.testing import CliRunner

import hfvlm
from hfvlm.checkpoints import CheckpointError
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.cli.commands import app
from hfvlm.conversion.languagebind import config_from_original, keys_for, processor_for
from hfvlm.media import MediaError
from hfvlm.models.languagebind import (
    HfvlmLanguageBindConfig,
    HfvlmLanguageBindDepthFeatureExtractor,
    HfvlmLanguageBindFeatureExtractor,
    HfvlmLanguageBindImageProcessor,
    HfvlmLanguageBindProcessor,
    HfvlmLanguageBindThermalFeatureExtractor,
    HfvlmLanguageBindVideoFeatureExtractor,
)
from hfvlm.presets import load_preset
from hfvlm.release.verification import samples, verify
from tests.conftest import SHIPPED

VOCABULARY = SHIPPED / "bpe_simple_vocab.txt.gz"
IMAGES = np.random.RandomState(0).randint(0, 256, (2, 40, 60, 3), dtype=np.uint8)
RELEASES = ("image", "video", "audio", "depth", "thermal")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModel.from_config(load_preset("languagebind/tiny").make_config()).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A LanguageBind that learned nothing yet: the tiny preset with the small CLIP's vocabulary. Read only."""
    folder, preset = tmp_path_factory.mktemp("languagebind"), load_preset("languagebind/tiny")
    model.save_pretrained(folder)
    processor_for(model.config, preset.processor, VOCABULARY).save_pretrained(folder)
    return folder


def test_a_folder_is_whole(folder):
    checks = verify(folder)
    assert [check for check in checks if not check.passed] == []
    assert sum("alone equals" in check.name for check in checks) == 6


def test_the_processor_survives_a_round_trip(folder, tmp_path):
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is HfvlmLanguageBindProcessor
    assert processor.modalities == ("image", "video", "text", "audio", "depth", "thermal")
    assert processor.video_feature_extractor.num_frames == 4
    processor.depth_feature_extractor.farthest = 8.0
    processor.image_processor.antialias = True
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.depth_feature_extractor.farthest == 8.0
    assert again.image_processor.antialias
    assert again.tokenizer.clean == "repaired"
    assert (again.feature_extractor.num_mel_bins, again.feature_extractor.num_frames) == (16, 64)


def test_everything_at_once_and_each_alone(folder, model):
    processor = AutoProcessor.from_pretrained(folder)
    names = {"image": "images", "video": "videos"}
    output = model(**processor(**{names.get(m, m): samples(m) for m in processor.modalities}))
    assert set(output.modalities) == set(model.modalities)
    for modality in model.modalities:
        alone = getattr(model, f"get_{modality}_features")(**processor.prepare(modality, samples(modality)))
        embeds = output[f"{modality}_embeds"] * model.scale(modality)
        assert torch.allclose(alone.pooler_output, embeds, atol=1e-4), modality


def test_the_pipeline_and_the_embedder(folder):
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    assert len(classify(Image.fromarray(IMAGES[0]), candidate_labels=["a", "b", "c"])) == 3
    embedder = hfvlm.Embedder.from_pretrained(folder, modalities=["video", "audio"])
    found = embedder.encode(video=[list(IMAGES)] * 2, audio=[(np.zeros(16_000), 16_000)] * 2)
    assert found.similarity("video", "audio").shape == (2, 2)


# Pixels


def test_images_are_sampled_or_averaged():
    """An image of single black and white columns is grey where a pixel covers several of them."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    raw = {"do_normalize": False, "return_tensors": "pt"}
    processor = HfvlmLanguageBindImageProcessor(size=16)
    sampled, averaged = (processor(stripes, antialias=a, **raw)["pixel_values"] for a in (False, True))
    assert averaged[..., 4:-4, 4:-4].std() < 0.01 < sampled.mean().abs()
    expected = F.interpolate(torch.from_numpy(stripes).permute(2, 0, 1)[None] / 255, (16, 16), mode="bicubic")
    assert torch.allclose(sampled, expected, atol=1e-6)
    grey = processor(Image.fromarray(IMAGES[0]).convert("L"), **raw)["pixel_values"]
    assert torch.equal(grey[:, 0], grey[:, 2])
    with pytest.raises(ValueError, match="bicubic squares only"):
        processor(stripes, resize_mode="squash")


def test_frames_are_spread_over_a_video():
    extractor = HfvlmLanguageBindVideoFeatureExtractor(size=8, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    video = np.stack([np.full((12, 20, 3), i, np.uint8) for i in range(30)])
    shown = extractor(video, return_tensors="pt")["pixel_values_videos"]
    assert shown.shape == (1, 3, 8, 8, 8)
    assert (shown[0, 0, :, 0, 0] * 255).round().int().tolist() == [0, 4, 8, 12, 16, 20, 24, 29]
    short = extractor(video[:3], num_frames=4)["pixel_values_videos"][0]
    assert (short[0, :, 0, 0] * 255).round().tolist() == [0, 0, 1, 2]


def test_a_video_is_never_mirrored():
    video = np.zeros((8, 10, 10, 3), np.uint8)
    video[:, :, 5:] = 255
    extractor = HfvlmLanguageBindVideoFeatureExtractor(size=10)
    shown = [extractor(video)["pixel_values_videos"][0] for _ in range(8)]
    assert all(np.array_equal(shown[0], other) and other[0, 0, 0, -1] > other[0, 0, 0, 0] for other in shown)


def test_short_audio_is_repeated_and_long_ones_read_in_three_places():
    extractor = HfvlmLanguageBindFeatureExtractor(num_mel_bins=20, num_frames=100)
    noise = np.random.RandomState(0).uniform(-0.5, 0.5, 16_000 * 5).astype(np.float32)
    short = extractor((noise[: 160 * 39 + 400], 16_000), return_tensors="pt")["input_features"][0]
    assert short.shape == (3, 20, 100)
    assert torch.equal(short[0], short[2])
    assert torch.equal(short[:, :, 40:80], short[:, :, :40])
    assert torch.equal(short[:, :, 80:], short[:, :, :20])
    assert extractor.starts(100, 100) == [0, 0, 0]
    assert extractor.starts(101, 100) == [0, 1, 0]
    assert extractor.starts(400, 100) == [0, 101, 201]
    before = noise.copy()
    long = extractor((noise, 16_000), return_tensors="pt")["input_features"][0]
    assert np.array_equal(noise, before)
    assert not torch.equal(long[0], long[1])
    stereo = np.stack([noise, np.zeros_like(noise)])
    assert extractor((stereo, 16_000))["input_features"][0].shape == (3, 20, 100)
    with pytest.raises(MediaError, match="too short: at least 25 ms"):
        extractor((noise[:300], 16_000))


def test_depth_is_a_share_of_ten_metres():
    plain = {"size": 8, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    extractor = HfvlmLanguageBindDepthFeatureExtractor(**plain)
    for metres, share in ((2.5, 0.25), (40.0, 1.0), (0.0, 0.001)):
        values = extractor(np.full((12, 16), metres))["depth_values"][0]
        assert values.shape == (3, 8, 8)
        assert np.allclose(values, share, atol=1e-6)
    assert np.allclose(extractor(np.full((12, 16), 2500, np.uint16))["depth_values"][0], 0.25, atol=1e-6)
    ramp = np.tile(np.linspace(1, 20, 16), (12, 1))
    assert extractor(ramp, farthest=0)["depth_values"][0].max() <= 1.05
    assert np.allclose(extractor(np.full((12, 16), 3.0), farthest=0)["depth_values"][0], 1.0)


def test_thermal_images_are_grey_images(folder):
    processor = AutoProcessor.from_pretrained(folder)
    grey = IMAGES[..., 0]
    values = processor.prepare("thermal", list(grey))["thermal_values"]
    pixels = processor.prepare("image", list(grey))["pixel_values"]
    assert torch.allclose(values, pixels, atol=1e-5)
    plain = HfvlmLanguageBindThermalFeatureExtractor(size=8, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    assert np.allclose(plain(np.full((10, 10), 25.0), limits=(0, 50))["thermal_values"][0], 0.5)


def test_thin_images_are_refused():
    with pytest.raises(MediaError, match="too thin"):
        HfvlmLanguageBindImageProcessor()(np.zeros((1, 4000, 3), np.uint8))


# Releases


def release(model, modality, path, alpha=None):
    """A folder as the authors release it, made from one tower of a model and its texts'; with `alpha`, as an adapter
    of rank 2 on other weights."""
    rows = keys_for(model.config, modality)
    tower = model.towers[modality]
    own = {k: v for k, v in model.state_dict().items() if k.startswith((f"{tower}.", "text_model."))}
    changes = {f"{tower}.class_token", f"{tower}.patches.projection.weight"} if modality == "video" else set()
    rows = [row._replace(change=None) if row.target in changes else row for row in rows]
    own |= {f"logit_scales.{modality}.scale": model.logit_scales[modality].scale.detach() + RELEASES.index(modality)}
    tensors = restore_keys(own, rows)
    vision = json.loads(getattr(model.config, f"{tower.removesuffix('_model')}_config").to_json_string())
    vision |= {"add_time_attn": modality == "video", "lora_r": 0, "lora_alpha": 16}
    if modality == "video":
        tensors["vision_model.embeddings.class_embedding"] = tensors["vision_model.embeddings.class_embedding"][0]
    if modality == "audio":
        vision |= {"num_mel_bins": 16, "target_length": 64, "image_size": 224, "audio_mean": 0.0}
    if alpha:
        tensors, vision["lora_alpha"] = (
            adapted(tensors, alpha, "temporal_attn" if modality == "video" else "self_attn"),
            alpha,
        )
    path.mkdir()
    torch.save(tensors, path / "pytorch_model.bin")
    settings = {
        "model_type": f"LanguageBind{modality.capitalize()}",
        "text_config": json.loads(model.config.text_config.to_json_string()),
        "vision_config": vision,
        "projection_dim": model.config.text_config.projection_dim,
    }
    (path / "config.json").write_text(json.dumps(settings))
    return path


def adapted(tensors, alpha, layers):
    """The same weights as a base and an adapter in PEFT's names."""
    before, after = "vision_model.encoder.", "vision_model.encoder.base_model.model."
    found = {}
    for key, tensor in tensors.items():
        name = key.replace(before, after)
        if key.startswith(before) and f".{layers}." in key and key.endswith("weight"):
            a, b = torch.randn(2, tensor.shape[1]) * 0.1, torch.randn(tensor.shape[0], 2) * 0.1
            found[name.replace(".weight", ".lora_A.default.weight")] = a
            found[name.replace(".weight", ".lora_B.default.weight")] = b
            tensor = tensor - alpha / 2 * b @ a
        found[name] = tensor
    return found


def assert_tower_of(loaded, model, modality):
    assert loaded.logit_scales[modality].scale.item() == pytest.approx(
        model.logit_scales[modality].scale.item() + RELEASES.index(modality)
    )
    expected = model.tower(modality).state_dict()
    for key, tensor in loaded.tower(modality).state_dict().items():
        assert torch.allclose(tensor, expected[key], atol=1e-6), (modality, key)


@pytest.mark.parametrize("modality", RELEASES)
@pytest.mark.parametrize("alpha", [None, 5])
def test_a_release_alone(model, tmp_path, modality, alpha):
    source = release(model, modality, tmp_path / "release", alpha)
    out = hfvlm.convert(source, "languagebind", tmp_path / "out", vocabulary=VOCABULARY)
    loaded, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert set(loaded.modalities) == {modality, "text"}
    assert_tower_of(loaded, model, modality)
    assert torch.equal(loaded.text_model.projection.weight, model.text_model.projection.weight)
    processor = AutoProcessor.from_pretrained(out)
    assert loaded(**processor.prepare(modality, samples(modality)), **processor.prepare("text", ["a", "b"])).modalities
    assert processor.feature_extractor.mean == (0.0 if modality == "audio" else -4.2677393)


def test_several_releases_make_one_model(model, tmp_path):
    alphas = {"depth": 4, "thermal": 8, "video": 3}
    folders = {m: release(model, m, tmp_path / m, alphas.get(m)) for m in RELEASES}
    parts = {m: folders[m] for m in RELEASES if m != "image"}
    out = hfvlm.convert(folders["image"], "languagebind", tmp_path / "out", parts=parts, vocabulary=VOCABULARY)
    loaded = AutoModel.from_pretrained(out)
    assert loaded.modalities == model.modalities
    for modality in RELEASES:
        assert_tower_of(loaded, model, modality)
    assert set(json.loads((out / "conversion.json").read_text())["parts"]) == set(parts)
    assert [check for check in verify(out) if not check.passed] == []
    # Any of them may be the first.
    arguments = ["convert", folders["depth"], "--preset", "languagebind", "--part", f"audio={folders['audio']}"]
    arguments += ["-o", tmp_path / "two", "--vocabulary", VOCABULARY]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert AutoModel.from_pretrained(tmp_path / "two").modalities == ("text", "audio", "depth")


def test_what_does_not_fit_is_logged(model, tmp_path, caplog, monkeypatch):
    folders = {m: release(model, m, tmp_path / m, 4 if m == "depth" else None) for m in ("image", "depth", "audio")}

    def convert(main, **parts):
        return hfvlm.convert(
            main, "languagebind", tmp_path / "out", parts=parts, vocabulary=VOCABULARY, overwrite=True
        )

    with pytest.raises(ValueError, match="languagebind has no part smell"):
        convert(folders["image"], smell=folders["audio"])
    with pytest.raises(CheckpointError, match="image: more releases than the model is made of"):
        convert(folders["image"], image=folders["image"])
    with pytest.raises(FileNotFoundError, match="made of further releases .*video, the released folder"):
        hfvlm.convert(folders["image"], "languagebind/languagebind", tmp_path / "out", vocabulary=VOCABULARY)
    (folders["depth"] / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is an adapter, whose config.json \(vision_config.lora_alpha\)"):
        hfvlm.convert(folders["depth"], "languagebind/languagebind_depth", tmp_path / "out", vocabulary=VOCABULARY)
    with pytest.raises(CheckpointError, match="config.json.*is not beside it: no 'model_type'"):
        convert(folders["depth"])
    other = torch.load(folders["audio"] / "pytorch_model.bin")
    other["text_model.final_layer_norm.weight"] += 1
    torch.save(other, folders["audio"] / "pytorch_model.bin")
    warned = []
    monkeypatch.setattr("hfvlm.conversion.languagebind.logger.warning", warned.append)
    convert(folders["image"], audio=folders["audio"])
    assert "audio: its text tower is not the main source's; 1 tensors differ" in warned[0]


def test_options_of_no_release_are_refused():
    base = {"text_config": {}, "projection_dim": 16}
    for modality, vision in (
        ("video", {"num_frames": 2}),
        ("video", {"add_time_attn": True, "tube_size": 2}),
        ("image", {"add_time_attn": True}),
    ):
        with pytest.raises(UnsupportedOriginalError, match="no released tower of this kind"):
            config_from_original({"modality": modality, "config": base | {"vision_config": vision}}, {})
    with pytest.raises(UnsupportedOriginalError, match="'clip' is no LanguageBind"):
        config_from_original({"model_type": "clip"} | base, {})


def test_every_release_has_a_preset():
    names = (
        "image",
        "video",
        "video_ft",
        "video_v1.5_ft",
        "video_huge_v1.5_ft",
        "audio",
        "audio_ft",
        "depth",
        "thermal",
    )
    for name in names:
        config = load_preset(f"languagebind/languagebind_{name}").make_config()
        assert set(config.modalities) == {name.split("_")[0], "text"}
    assert load_preset("languagebind/languagebind").make_config().modalities == tuple(HfvlmLanguageBindConfig.towers)
