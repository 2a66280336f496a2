"""CLIP with towers that are models of transformers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    ConvNextConfig,
    M2M100Config,
    RobertaConfig,
    SwinConfig,
    __version__,
    pipeline,
)

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.conversion.clip import CONVERSION
from hfvlm.models.clip import (
    HfvlmCLIPConfig,
    HfvlmCLIPForImageClassification,
    HfvlmCLIPModel,
    HfvlmCLIPXLMTokenizer,
    HfvlmTextTrunkConfig,
    HfvlmTextTrunkModel,
    HfvlmVisionTrunkConfig,
    HfvlmVisionTrunkModel,
)
from hfvlm.versions import numbers
from tests.models.clip.test_modeling import TEXT
from tests.support.golden import OURS
from tests.support.suite import ModelSuite, PartSuite, close

CONVNEXT = {"model_type": "convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 24], "image_size": 32}
CONVNEXT |= {"layer_scale_init_value": 1.0}
SWIN = {"model_type": "swin", "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
SWIN |= {"window_size": 4, "drop_path_rate": 0.0, "initializer_range": 0.2}
ROBERTA = {"model_type": "roberta", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48} | {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
    "type_vocab_size": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
NLLB = {"model_type": "m2m_100", "vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1} | {
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 20,
    "encoder_layerdrop": 0.0,
    "dropout": 0.0,
}
SWIN_LORA = ["query", "value"] if numbers(__version__) < (5, 12) else ["q_proj", "v_proj"]
IDS = torch.tensor([[0, 7, 2, 1, 1], [0, 7, 8, 9, 2], [0, 5, 4, 2, 1]])


class TestCLIPOfTransformers(ModelSuite):
    """A ConvNeXt and a RoBERTa."""

    test_compiles_as_one_graph = None  # the towers are transformers'
    model_class, auto_class = HfvlmCLIPModel, AutoModelForZeroShotImageClassification
    records = ("hidden_states",)
    lora_layers = ("query", "value")

    def config(self):
        vision = {"model_type": "hfvlm_vision_trunk", "trunk_config": CONVNEXT, "projection_dim": 16}
        text = {"model_type": "hfvlm_text_trunk", "trunk_config": ROBERTA, "projection_dim": 16}
        return HfvlmCLIPConfig(
            vision_config=vision | {"projection_hidden_size": 32, "projection_bias": True},
            text_config=text | {"projection_hidden_size": 24},
        )

    def inputs(self):
        return {"input_ids": IDS, "pixel_values": torch.randn(3, 3, 32, 32)}

    def loss_inputs(self):
        return {"return_loss": True}

    def test_padding_is_what_the_mask_or_the_pads_say(self, model):
        mask = (IDS != 1).long()
        expected = model.get_text_features(IDS, mask).pooler_output
        close(model.get_text_features(IDS).pooler_output, expected, 1e-6, "pooled")
        close(model.get_text_features(IDS[:1, :3]).pooler_output, expected[:1], 1e-5, "without padding")


class TestCLIPWithSwin(PartSuite):
    """A Swin, whose keys versions of transformers have renamed, beside CLIP's own text tower."""

    model_class, auto_class = HfvlmCLIPModel, AutoModelForZeroShotImageClassification
    records = ("hidden_states",)
    implementations = ("eager", "sdpa")

    def config(self):
        return HfvlmCLIPConfig(vision_config=dict(SWIN), text_config=dict(TEXT))

    def inputs(self):
        return {"input_ids": torch.tensor([[48, 2, 49]]).repeat(3, 1), "pixel_values": torch.randn(3, 3, 32, 32)}

    def loss_inputs(self):
        return {"return_loss": True}


def test_a_classifier_starts_from_a_trunk(tmp_path):
    """As from every vision tower; LoRA adapts it by the names of transformers' version."""
    config = HfvlmCLIPConfig(vision_config=dict(SWIN), text_config=dict(TEXT))
    whole = HfvlmCLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    head, info = HfvlmCLIPForImageClassification.from_pretrained(tmp_path, num_labels=4, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    images = torch.randn(2, 3, 32, 32)
    assert head(images, labels=torch.tensor([0, 3])).loss.isfinite()
    found, expected = (model.vision_model.eval()(images).pooler_output for model in (head, whole))
    close(found, expected, 1e-6, "pooled")
    trained = [name for name, p in hfvlm.lora(head, "vision", quiet=True).named_parameters() if p.requires_grad]
    assert any(SWIN_LORA[0] in name for name in trained)


def test_configurations_of_transformers_become_towers():
    config = HfvlmCLIPConfig(vision_config=ConvNextConfig(**CONVNEXT), text_config=dict(TEXT))
    assert type(config.vision_config) is HfvlmVisionTrunkConfig
    assert (config.vision_config.projection_dim, config.vision_config.pooled_size) == (16, 24)
    config = HfvlmCLIPConfig(vision_config=dict(SWIN), text_config=RobertaConfig(**ROBERTA))
    assert type(config.text_config) is HfvlmTextTrunkConfig
    assert config.vision_config.projection_dim == config.text_config.projection_dim == 512
    assert isinstance(config.vision_config.trunk_config, SwinConfig)


def test_a_text_tower_takes_the_encoder_of_a_translator():
    """NLLB's, whose first token names the language."""
    model = HfvlmTextTrunkModel(
        HfvlmTextTrunkConfig(trunk_config=dict(NLLB), pooling="first", projection_dim=16)
    ).eval()
    assert isinstance(model.config.trunk_config, M2M100Config)
    assert not any("decoder" in name for name, _ in model.named_parameters())
    output = model(IDS)
    close(model.projection(output.last_hidden_state[:, 0]), output.embeds, 1e-6, "first")
    left = IDS.new_ones(1, 7)
    left[0, 2:] = IDS[1]
    close(model(left).embeds, output.embeds[1:2], 1e-5, "padded on the left")


@pytest.mark.parametrize("pooling", ["pooler", "mean", "first", "max"])
def test_pooling(pooling):
    trunk = dict(ROBERTA)
    model = HfvlmTextTrunkModel(HfvlmTextTrunkConfig(trunk_config=trunk, pooling=pooling, projection_dim=None)).eval()
    assert (model.trunk.pooler is not None) == (pooling == "pooler")
    x, expected = model(IDS).last_hidden_state, model(IDS).embeds
    mask = (IDS != 1).unsqueeze(-1)
    by_hand = {"mean": (x * mask).sum(1) / mask.sum(1), "first": x[:, 0]}
    by_hand["max"] = torch.stack([row[keep].amax(0) for row, keep in zip(x, IDS != 1, strict=True)])
    if pooling in by_hand:
        close(expected, by_hand[pooling], 1e-6, pooling)
    else:
        assert torch.equal(expected, model.trunk.pooler(x))


def test_the_mean_of_a_map_is_that_of_its_places():
    config = HfvlmVisionTrunkConfig(trunk_config=dict(CONVNEXT), pooling="mean", projection_dim=None)
    output = HfvlmVisionTrunkModel(config).eval()(torch.randn(2, 3, 64, 32))
    close(output.embeds, output.last_hidden_state.mean(dim=(2, 3)), 1e-6, "mean")


def test_towers_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="vision_config: RobertaModel takes input_ids"):
        HfvlmVisionTrunkModel(HfvlmVisionTrunkConfig(trunk_config=RobertaConfig(**ROBERTA), pooling="mean"))
    with pytest.raises(Exception, match="pooling 'median' is none of pooler, first, mean, max"):
        HfvlmTextTrunkConfig(pooling="median")
    model = HfvlmTextTrunkModel(HfvlmTextTrunkConfig(trunk_config=dict(NLLB), pooling="pooler"))
    with pytest.raises(ValueError, match='no pooled output of its own: set pooling to "mean" or "first"'):
        model(IDS)


def test_a_trunk_without_attention_takes_any_implementation(tmp_path):
    """Which the other tower needs."""
    model = HfvlmCLIPModel(HfvlmCLIPConfig(vision_config=dict(CONVNEXT), text_config=dict(TEXT)))
    model.save_pretrained(tmp_path)
    for name in ("sdpa", "eager"):
        again = HfvlmCLIPModel.from_pretrained(tmp_path, attn_implementation=name)
        assert again.text_model.config._attn_implementation == name


def test_the_epsilon_is_that_of_every_norm():
    config = HfvlmVisionTrunkConfig(trunk_config=dict(CONVNEXT), layer_norm_eps=1e-3)
    norms = [m for m in HfvlmVisionTrunkModel(config).modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) > 5
    assert {norm.eps for norm in norms} == {1e-3}


def test_a_tower_is_found_by_its_configuration():
    config = HfvlmVisionTrunkConfig(trunk_config=dict(SWIN))
    assert type(AutoModel.from_config(config)) is HfvlmVisionTrunkModel
    assert HfvlmVisionTrunkConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_lora_adapts_both_towers(tmp_path):
    """By default, by the names that each trunk has for its layers; the projections as in every tower."""
    text = {"model_type": "hfvlm_text_trunk", "trunk_config": ROBERTA}
    model = HfvlmCLIPModel(HfvlmCLIPConfig(vision_config=dict(CONVNEXT), text_config=text))
    tuned = hfvlm.lora(model, "vision+text+projection", quiet=True)
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert any("vision_model.trunk" in name and "pwconv1.lora_A" in name for name in trained)
    assert any("text_model.trunk" in name and "query.lora_A" in name for name in trained)
    assert any("text_model.projection.modules_to_save" in name for name in trained)
    tuned.save_pretrained(tmp_path)


def test_an_embedder_and_a_pipeline_use_the_towers(tmp_path):
    """From a converted file of open_clip's to vectors, and to scores of texts."""
    tokenizer = HfvlmCLIPXLMTokenizer.from_vocabulary(OURS / "clip/processor-tokenizer-xlm/sentencepiece.bpe.model")
    roberta = ROBERTA | {"model_type": "xlm-roberta", "vocab_size": len(tokenizer)}
    text = {"model_type": "hfvlm_text_trunk", "trunk_config": roberta, "projection_dim": 16}
    text |= {"max_position_embeddings": 16, "projection_hidden_size": 24}
    vision = {"model_type": "hfvlm_vision_trunk", "trunk_config": CONVNEXT, "projection_dim": 16}
    config = HfvlmCLIPConfig(vision_config=vision, text_config=text)
    model = HfvlmCLIPModel(config).eval()
    torch.save(restore_keys(model.state_dict(), CONVERSION.keys_for(config)), tmp_path / "open_clip_pytorch_model.bin")
    kinds = {"hf_model_name": "xlm-roberta-base", "hf_pooler_type": "mean_pooler", "context_length": 16}
    kinds |= {"hf_model_config": roberta}
    original = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"timm_model_name": "convnext_base", "timm_proj": "linear", "image_size": 32},
            "text_cfg": kinds,
        },
        "preprocess_cfg": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(original))
    vocabulary = OURS / "clip/processor-tokenizer-xlm/sentencepiece.bpe.model"
    folder = hfvlm.convert(tmp_path, "clip", tmp_path / "out", vocabulary=vocabulary)
    embedder = hfvlm.Embedder.from_pretrained(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    found = embedder.encode(image=[image], text=["a photo of a cat", "une photo"], output="torch")
    ids = tokenizer(["a photo of a cat", "une photo"], return_tensors="pt")
    with torch.no_grad():
        expected = model.get_text_features(**ids).pooler_output
    close(found["text"], torch.nn.functional.normalize(expected, dim=-1), 1e-4, "texts")
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    scores = classify(image, candidate_labels=["cat", "dog"], hypothesis_template="a photo of a {}")
    assert {row["label"] for row in scores} == {"cat", "dog"}
    assert found["image"].shape == (1, 16)
    assert all(check.passed for check in hfvlm.verify(folder))
