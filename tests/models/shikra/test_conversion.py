"""Shikra's releases become what they were made from."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import hfvlm
from hfvlm.checkpoints import CheckpointError
from hfvlm.checkpoints.key_table import KeyTableError, restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.blocks import transformers_vision_rows
from hfvlm.conversion.shikra import config_from_original, keys_for
from hfvlm.models.shikra import HfvlmShikraConfig, HfvlmShikraForConditionalGeneration
from hfvlm.presets import load_preset
from tests.models.llava.tiny import TEXT, VISION, vision_settings, write
from tests.support.paths import OURS
from tests.support.suite import close

VOCABULARY = OURS / "shikra" / "processor-prompts" / "tokenizer.model"
PIECES = 480
# As the authors' training writes config.json.
ORIGINAL = {
    **{name: value for name, value in TEXT.items() if name != "model_type"},
    "model_type": "shikra",
    "vocab_size": PIECES + 3,
    "mm_vision_tower": "openai/clip-vit-large-patch14",
    "use_mm_proj": True,
    "mm_hidden_size": VISION["hidden_size"],
    "mm_vision_select_layer": -2,
    "mm_use_im_start_end": True,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    text = TEXT | {"vocab_size": PIECES + 3}
    config = HfvlmShikraConfig(vision_config=VISION, text_config=text, image_token_id=PIECES)
    model = HfvlmShikraForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, so that a forgotten one shows
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture
def release(model, tmp_path):
    """Folders of the whole model, its base, the difference of the two, and the tower."""
    ours = model.state_dict()
    tower = {key: tensor for key, tensor in ours.items() if key.startswith("vision_model.")}
    rest = {key: tensor for key, tensor in ours.items() if key not in tower}
    whole = restore_keys(rest, keys_for(model.config))
    base = {key: torch.randn_like(t[:PIECES]) * t.std() for key, t in whole.items() if "mm_projector" not in key}
    delta = {key: t.clone() for key, t in whole.items()}
    for key, tensor in base.items():
        delta[key][:PIECES] -= tensor
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    settings = ORIGINAL | {"vision_config": vision_settings(model)}
    folders = {
        "whole": write(tmp_path / "whole", "pytorch_model.bin", whole, settings),
        "delta": write(tmp_path / "delta", "pytorch_model.bin", delta | buffers, ORIGINAL),
        "base": write(tmp_path / "base", "pytorch_model.bin", base | buffers, TEXT),
        "vision": write(
            tmp_path / "vision",
            "pytorch_model.bin",
            restore_keys(tower, transformers_vision_rows("vision_model", "vision_model")),
            vision_settings(model),
        ),
    }
    for name in ("whole", "base"):
        shutil.copy(VOCABULARY, folders[name])
    return folders


@pytest.fixture
def preset(model, monkeypatch):
    """The released checkpoint's, at this size."""
    known = load_preset("shikra/shikra-7b-delta-v1")
    sizes = {name: getattr(model.config, name).to_dict() for name in ("vision_config", "text_config")}
    small = known.__class__(**{**vars(known), "config": sizes | {"image_token_id": PIECES}})
    for module in ("sources", "plans"):
        monkeypatch.setattr(f"hfvlm.release.{module}.load_preset", lambda name: small)
    return "shikra/shikra-7b-delta-v1"


def same_weights(folder, model):
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for name, value in loaded.state_dict().items():
        close(value, model.state_dict()[name], 1e-6, name)
    return loaded


def test_its_own_configuration_is_the_presets():
    released = {"vocab_size": 32003, "rms_norm_eps": 1e-6, "pad_token_id": 0, "max_position_embeddings": 2048}
    original = released | {"mm_vision_tower": "openai/clip-vit-large-patch14", "mm_use_im_start_end": True}
    for name in ("shikra-7b-delta-v1", "shikra7b-delta-v1-0708"):
        assert config_from_original(original, {}).to_dict() == load_preset(name).make_config().to_dict()
    bare = config_from_original(original | {"mm_use_im_start_end": False, "vocab_size": 32001}, {})
    assert bare.image_token_id == 32000


def test_a_difference_on_its_base(release, preset, model, tmp_path):
    parts = {"base": release["base"], "vision": release["vision"]}
    folder = hfvlm.convert(release["delta"], preset, tmp_path / "out", parts=parts)
    loaded = same_weights(folder, model)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.image_token_id == loaded.config.image_token_id == PIECES
    assert processor.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [PIECES + 1, PIECES + 2]
    record = json.loads((folder / "conversion.json").read_text())
    assert set(record["parts"]) == {"base", "vision"}
    card = (folder / "README.md").read_text()
    assert "cc-by-nc-4.0" in card
    with pytest.raises(PermissionError, match="cc-by-nc-4.0"):
        hfvlm.push(folder, "me/shikra")


def test_a_whole_model(release, model, tmp_path):
    """As the authors' apply_delta.py writes it."""
    folder = hfvlm.convert(release["whole"], "shikra", tmp_path / "out", parts={"vision": release["vision"]})
    same_weights(folder, model)
    # The vocabulary that was written has all tokens already.
    again = hfvlm.convert(
        release["whole"],
        "shikra",
        tmp_path / "again",
        parts={"vision": release["vision"]},
        vocabulary=folder / "tokenizer.json",
    )
    left, right = (AutoProcessor.from_pretrained(place).encode("a <image> b") for place in (folder, again))
    assert left == right


def test_parts_that_are_missing_or_too_many(release, preset, tmp_path):
    with pytest.raises(FileNotFoundError, match="needs its base.*LLaMA 7B"):
        hfvlm.convert(release["delta"], preset, tmp_path / "out", parts={"vision": release["vision"]})
    with pytest.raises(FileNotFoundError, match="needs its vision.*CLIP"):
        hfvlm.convert(release["delta"], preset, tmp_path / "out", parts={"base": release["base"]})
    parts = {"base": release["base"], "vision": release["vision"]}
    with pytest.raises(CheckpointError, match="leave `base` out"):
        hfvlm.convert(release["whole"], "shikra", tmp_path / "out", parts=parts)
    assert not (tmp_path / "out").exists()


def test_what_is_strange_is_named(release, tmp_path):
    path = release["whole"] / "pytorch_model.bin"
    tensors = torch.load(path)
    tensors["model.stranger"] = tensors.pop("model.mm_projector.bias")
    torch.save(tensors, path)
    with pytest.raises(KeyTableError, match=r"model.stranger.*projector.layers.0.bias"):
        hfvlm.convert(release["whole"], "shikra", tmp_path / "out", parts={"vision": release["vision"]})


def test_another_models_vocabulary(release, tmp_path):
    config = release["whole"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"im_patch_token": PIECES - 1}))
    with pytest.raises(ValueError, match="its placeholder is 480, the model's 479"):
        hfvlm.convert(release["whole"], "shikra", tmp_path / "out", parts={"vision": release["vision"]})


def test_export_says_that_transformers_has_none(release, tmp_path):
    folder = hfvlm.convert(release["whole"], "shikra", tmp_path / "out", parts={"vision": release["vision"]})
    with pytest.raises(UnsupportedOriginalError, match="no classes of its own"):
        hfvlm.export(folder, tmp_path / "native")
