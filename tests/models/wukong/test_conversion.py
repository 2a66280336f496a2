"""Files as the authors released them."""

import runpy
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, SwinConfig, pipeline

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.wukong import config_from_original, keys_for
from hfvlm.models.clip import HfvlmVisionTrunkConfig
from hfvlm.models.wukong import (
    HfvlmWukongCLIPModel,
    HfvlmWukongModel,
    HfvlmWukongTokenizer,
    HfvlmWukongTrunkConfig,
)
from hfvlm.presets import load_preset
from tests.support.paths import EXAMPLES, OURS

VOCABULARY = OURS / "wukong" / "processor-tokenizer" / "vocab.txt"
WIDTH = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 1}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
CONFIG = {
    "vision_config": WIDTH | {"image_size": 16, "patch_size": 8, "projection_dim": 16},
    "text_config": WIDTH | {"vocab_size": 54, "max_position_embeddings": 12, "projection_dim": 16},
}
PAIRS = {"猫": "一只猫的照片", "狗": "dog"}


def model_of(kind):
    torch.manual_seed(0)
    name, _, swin = kind.partition("-")
    config_class = (HfvlmWukongCLIPModel if name == "clip" else HfvlmWukongModel).config_class
    options = {"filip": {"num_image_tokens": None}, "wukong": {"num_image_tokens": 3}}.get(name, {})
    trunk = HfvlmVisionTrunkConfig if name == "clip" else HfvlmWukongTrunkConfig
    head = {"pooling": "mean", "projection_dim": 16, "projection_bias": True}
    towers = CONFIG | ({"vision_config": trunk(trunk_config=SwinConfig(**SWIN), **head)} if swin else {})
    model = AutoModel.from_config(config_class(**towers, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def released(model, path, *, scale=True, learner=False):
    """A file of the model's weights in the authors' names."""
    stored = {key: t for key, t in model.state_dict().items() if not key.endswith(".relative_position_index")}
    tensors = restore_keys(stored, keys_for(model.config))
    tensors = {key: tensor.clone() for key, tensor in tensors.items() if scale or key != "loss.logit_scale"}
    if learner:
        tensors = {key.replace("token_reduction", "token_learner"): tensor for key, tensor in tensors.items()}
    torch.save({"state_dict": tensors, "epoch": 3}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "original"),
    [
        ("wukong", None),
        ("filip", {"is_token_wise": True}),
        ("clip", {"is_token_wise": False}),
        ("wukong-swin", {"visual": {"type": "SwinTransformer", "img_size": 32}}),
        ("clip-swin", {"visual": {"type": "SwinTransformer", "img_size": 32}, "is_token_wise": False}),
    ],
)
def test_a_checkpoint_to_a_pipeline(tmp_path, kind, original):
    model = model_of(kind)
    path = released(model, tmp_path / "wukong.ckpt", learner=True)
    hfvlm.convert(path, "wukong", tmp_path / kind, original=original, vocabulary=VOCABULARY)
    assert [check for check in hfvlm.verify(tmp_path / kind) if not check.passed] == []
    loaded, processor = AutoModel.from_pretrained(tmp_path / kind), AutoProcessor.from_pretrained(tmp_path / kind)
    assert type(loaded) is type(model)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert isinstance(processor.tokenizer, HfvlmWukongTokenizer)
    image = Image.new("RGB", (40, 50), "blue")
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / kind))
    found = {row["label"]: row["score"] for row in classify(image, list(PAIRS.values()), hypothesis_template="{}")}
    inputs = processor(images=image, text=list(PAIRS.values()))
    expected = model(**inputs).logits_per_image.softmax(dim=-1)[0]
    assert [found[text] for text in PAIRS.values()] == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_example_matches_words_with_patches(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (40, 50), "blue").save(tmp_path / "blue.png")
    example = str(EXAMPLES / "words_to_patches.py")
    for kind in ("filip", "wukong"):
        path = released(model_of(kind), tmp_path / f"{kind}.ckpt")
        hfvlm.convert(path, "wukong", tmp_path / kind, original={"is_token_wise": True}, vocabulary=VOCABULARY)
    monkeypatch.setattr(sys, "argv", [example, str(tmp_path / "filip"), str(tmp_path / "blue.png"), "一只猫"])
    runpy.run_path(example, run_name="__main__")
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[-1] for line in lines] == ["[CLS]", "一", "只", "猫", "[SEP]", "一只猫"]
    scores = [float(line.split()[0]) for line in lines]
    assert scores[-1] == pytest.approx(sum(scores[:-1]) / 5, abs=1e-3)
    sys.argv[1] = str(tmp_path / "wukong")
    with pytest.raises(SystemExit, match="compares words with 3 sums of patches"):
        runpy.run_path(example, run_name="__main__")


def test_a_file_without_a_temperature_has_the_initial_one(tmp_path, caplog):
    path = released(model_of("wukong"), tmp_path / "wukong.ckpt", scale=False)
    hfvlm.convert(path, "wukong", tmp_path / "wukong", vocabulary="none")
    assert "nothing for logit_scale.scale: initialised" in caplog.text
    scale = AutoModel.from_pretrained(tmp_path / "wukong").logit_scale.scale
    assert scale.tolist() == pytest.approx([2.6592])


def test_what_shapes_do_not_say_is_asked_for(tmp_path):
    path = released(model_of("filip"), tmp_path / "filip.ckpt")
    with pytest.raises(UnsupportedOriginalError, match=r"original=\{'is_token_wise': True\} for FILIP"):
        hfvlm.convert(path, "wukong", tmp_path / "filip", vocabulary="none")
    tensors = torch.load(path)["state_dict"]
    for part, options in (("text", {"made_up": 1}), ("visual", {"made_up": 1}), ("made_up", 1)):
        with pytest.raises(UnsupportedOriginalError, match="does not implement .*made_up"):
            config_from_original({"is_token_wise": True, "visual": {}, part: options}, tensors)
    reduction = {"token_reduction": {"num_tokens": 3, "num_groups": 4}}
    with pytest.raises(UnsupportedOriginalError, match="num_groups"):
        config_from_original({"is_token_wise": True, "visual": reduction}, tensors)


def test_every_release_has_a_preset():
    for size, tokens in (("b", 12), ("l", 24)):
        kinds = {suffix: load_preset(f"wukong/wukong_vit_{size}{suffix}").make_config() for suffix in ("_g", "_f", "")}
        assert kinds["_g"].model_type == "hfvlm_wukong_clip"
        assert [kinds[suffix].num_image_tokens for suffix in ("_f", "")] == [None, tokens]
