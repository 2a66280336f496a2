"""The vision towers that open_clip takes from timm: those that are written out, and those that timm runs."""

import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import AutoModel

from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.timm_towers import timm_config
from hfvlm.modeling.timm_trunks import TimmMissingError
from hfvlm.models.clip import (
    HfvlmCLIPConfig,
    HfvlmCLIPEVA02Config,
    HfvlmCLIPEVA02Model,
    HfvlmCLIPEVAConfig,
    HfvlmCLIPEVAModel,
    HfvlmCLIPEVAPostNormConfig,
    HfvlmCLIPEVAPostNormModel,
    HfvlmCLIPForImageClassification,
    HfvlmCLIPModel,
    HfvlmCLIPPEConfig,
    HfvlmCLIPPEGiganticConfig,
    HfvlmCLIPPEGiganticModel,
    HfvlmCLIPPEModel,
    HfvlmCLIPViTConfig,
    HfvlmCLIPViTModel,
    HfvlmTimmTrunkConfig,
    HfvlmTimmTrunkModel,
)
from hfvlm.models.clip.towers.modeling_timm import rotate
from tests.models.clip.test_modeling import IDS, SIZES, TEXT
from tests.support.suite import ModelSuite, PartSuite, close

VIT = SIZES | {"image_size": 28, "patch_size": 14, "projection_dim": 16}
POOL = {"pool_heads": 4, "pool_intermediate_size": 48}
OTHERS = {
    HfvlmCLIPViTModel: HfvlmCLIPViTConfig(**VIT),
    HfvlmCLIPEVAModel: HfvlmCLIPEVAConfig(**VIT),
    HfvlmCLIPPEGiganticModel: HfvlmCLIPPEGiganticConfig(**VIT, **POOL),
}


def pixels(*size):
    return torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))


class TestEVAPostNorm(PartSuite):
    model_class, auto_class = HfvlmCLIPEVAPostNormModel, AutoModel

    def config(self):
        return HfvlmCLIPEVAPostNormConfig(**VIT)

    def inputs(self):
        return {"pixel_values": pixels(28, 28)}

    def test_what_a_layer_adds_has_the_norm_s_size(self, model, batch):
        """However large the attention's outputs are."""
        before = model(**batch).pooler_output
        with torch.no_grad():
            model.layers[0].attention.out_proj.weight *= 1e4
            model.layers[0].attention.out_proj.bias *= 1e4
        grown = model(**batch).pooler_output
        with torch.no_grad():
            model.layers[0].attention.out_proj.weight *= 1e4
            model.layers[0].attention.out_proj.bias *= 1e4
        close(model(**batch).pooler_output, grown, 1e-3, "pooled")
        assert not torch.allclose(before, grown)


class TestEVA02(PartSuite):
    model_class, auto_class = HfvlmCLIPEVA02Model, AutoModel

    def config(self):
        return HfvlmCLIPEVA02Config(**VIT)

    def inputs(self):
        return {"pixel_values": pixels(28, 28)}

    def test_keys_have_no_bias(self, model):
        assert model.layers[0].attention.k_proj.bias is None
        assert model.layers[0].attention.q_proj.bias is not None

    def test_coordinates_are_those_of_the_reference_grid(self, model):
        """Patches of a finer grid lie between those of a coarser one."""
        coarse, fine = model.rotation((2, 2), torch.device("cpu"))[0], model.rotation((4, 4), torch.device("cpu"))[0]
        close(coarse[1:], fine[1:][[0, 2, 8, 10]], 1e-6, "rotations")
        cos, sin = coarse[0].chunk(2)
        assert torch.equal(cos, torch.ones_like(cos))
        assert not sin.any(), "the class token is not turned"

    def test_any_size_with_interpolated_positions(self, model):
        assert model(pixels(42, 70), interpolate_pos_encoding=True).last_hidden_state.shape == (3, 16, 32)
        with pytest.raises(ValueError, match=r"pixel_values are \(42, 70\).*interpolate_pos_encoding"):
            model(pixels(42, 70))

    def test_dropped_patches_take_their_rotation_with_them(self):
        """Without learned positions to tell patches apart, the remaining ones still know where they were."""
        model = HfvlmCLIPEVA02Model(HfvlmCLIPEVA02Config(**VIT | {"image_size": 56, "patch_dropout": 0.5}))
        seen = []
        model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args[0], kwargs["rotation"])), with_kwargs=True
        )
        model.train()(pixels(56, 56))
        (x, rotation), whole = seen[0], model.rotation((4, 4), torch.device("cpu"))[0]
        assert x.shape[:2] == rotation.shape[:2] == (3, 9)
        tokens = model.with_positions(model.patches(pixels(56, 56)), pixels(56, 56), interpolate_pos_encoding=False)
        for row in range(3):
            where = torch.cdist(x[row], tokens[row]).argmin(dim=1)
            assert where[0] == 0
            assert len(set(where.tolist())) == 9
            assert torch.equal(rotation[row], whole[where])

    def test_heads_must_hold_two_rotations(self):
        with pytest.raises(StrictDataclassClassValidationError, match="no multiple of 4"):
            HfvlmCLIPEVA02Config(**VIT | {"hidden_size": 36, "num_attention_heads": 6})


class TestPE(PartSuite):
    model_class, auto_class = HfvlmCLIPPEModel, AutoModel

    def config(self):
        return HfvlmCLIPPEConfig(**VIT, **POOL)

    def inputs(self):
        return {"pixel_values": pixels(28, 28)}

    def test_columns_turn_the_first_half(self, model):
        """Two patches of one row differ in the first half of a head's rotations, two of one column in the second."""
        first, right, below = model.rotation((2, 2), torch.device("cpu"))[0, 1:4].chunk(2, dim=-1)[0]
        half = first.shape[-1] // 2
        assert torch.equal(first[half:], right[half:])
        assert torch.equal(first[:half], below[:half])
        assert not torch.equal(first[:half], right[:half])

    def test_pooling_has_heads_of_its_own(self, model):
        assert model.pool.attention.head_dim == 8
        assert model.pool.mlp.fc1.out_features == 48
        with pytest.raises(StrictDataclassClassValidationError, match="is not a multiple of pool_heads 5"):
            HfvlmCLIPPEConfig(**VIT | POOL | {"pool_heads": 5})


class TestCLIPWithEVA02(ModelSuite):
    model_class, auto_class = HfvlmCLIPModel, AutoModel

    def config(self):
        vision = VIT | {"model_type": "hfvlm_clip_eva02"}
        return HfvlmCLIPConfig(vision_config=vision, text_config=dict(TEXT))

    def inputs(self):
        return {"input_ids": IDS, "pixel_values": pixels(28, 28)}

    def loss_inputs(self):
        return {"return_loss": True}


def test_rotation_is_relative():
    """Scores depend on how far apart two tokens are alone."""
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()

    def turned(x, position):
        angles = position * torch.tensor([1.0, 0.1, 0.5, 0.3])
        return rotate(x, torch.cat([angles.cos(), angles.sin()])[None, None])

    scores = [(turned(q, a) * turned(k, b)).sum() for a, b in ((0, 3), (4, 7))]
    close(scores[0], scores[1], 1e-5, "score")


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_other_towers(kind, tmp_path):
    """They differ from those above in parts alone, each of which a case of the original's outputs covers."""
    model = AutoModel.from_config(OTHERS[kind]).eval()
    assert type(model) is kind
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    output = again(pixels(28, 28), output_hidden_states=True)
    assert torch.equal(output.embeds, model(pixels(28, 28)).embeds)
    assert len(output.hidden_states) == 3
    close(model(pixels(28, 28), until=1).last_hidden_state, output.hidden_states[1], 1e-6, "hidden state")
    assert {"layers.1", "post_norm", "pool", "projection"} == set(model.unused(1))
    output.embeds.sum().backward()
    assert [name for name, p in again.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", [HfvlmCLIPViTModel, HfvlmCLIPEVAModel])
def test_the_last_layer_computes_what_is_pooled(kind):
    model = kind(OTHERS[kind]).eval()
    close(model(pixels(28, 28), pooled_only=True).embeds, model(pixels(28, 28)).embeds, 1e-5, "embeds")


def test_classifiers_take_the_output_before_the_projection():
    vision = VIT | POOL | {"model_type": "hfvlm_clip_pe"}
    config = HfvlmCLIPConfig(vision_config=vision, text_config=dict(TEXT), num_labels=4)
    model = HfvlmCLIPForImageClassification(config)
    assert model(pixels(28, 28)).logits.shape == (3, 4)
    assert isinstance(model.vision_model.projection, nn.Identity)


SMALL = {
    "architecture": "fastvit_mci0",
    "model_args": {"global_pool": "avg", "layers": [1, 1, 1, 1], "embed_dims": [8, 16, 32, 64]},
    "image_size": 64,
    "hidden_size": 128,
    "projection_dim": 16,
    "projection_bias": True,
}


def test_a_configuration_needs_no_timm(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    vision = SMALL | {"model_type": "hfvlm_timm_trunk"}
    config = HfvlmCLIPConfig(vision_config=vision, text_config=dict(TEXT))
    config.save_pretrained(tmp_path)
    again = HfvlmCLIPConfig.from_pretrained(tmp_path).vision_config
    assert isinstance(again, HfvlmTimmTrunkConfig)
    assert {name: getattr(again, name) for name in SMALL} == SMALL


def test_without_timm_a_model_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(TimmMissingError, match=r"fastvit_mci0 is a model of timm.*pip install 'hfvlm\[timm\]'.*torch"):
        AutoModel.from_config(HfvlmTimmTrunkConfig(**SMALL))


def test_with_timm(tmp_path):
    pytest.importorskip("timm", exc_type=ImportError)
    model = AutoModel.from_config(HfvlmTimmTrunkConfig(**SMALL))
    assert type(model) is HfvlmTimmTrunkModel
    assert not model.gradient_checkpointing
    model.gradient_checkpointing = True
    output = model(pixels(64, 64))
    output.embeds.sum().backward()
    assert model.gradient_checkpointing
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.save_pretrained(tmp_path)
    again = HfvlmTimmTrunkModel.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(pixels(64, 64)).embeds, model.eval()(pixels(64, 64)).embeds)
    with pytest.raises(ValueError, match="hidden_size 64 is not 128, the width of fastvit_mci0"):
        AutoModel.from_config(HfvlmTimmTrunkConfig(**SMALL | {"hidden_size": 64}))


def read(name, pool="token", proj=None, **arguments):
    """What the converter reads of a trunk of two layers; the head is the trunk's own, or open_clip's."""
    head = "trunk.head.weight" if proj is None else "head.proj.weight"
    shapes = {
        head: (16, 32),
        "trunk.patch_embed.proj.weight": (32, 3, 14, 14),
        "trunk.pos_embed": (1, 5, 32),
        "trunk.blocks.0.mlp.fc2.weight": (32, 64),
        "trunk.blocks.1.mlp.fc2.weight": (32, 64),
    }
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "timm_model_kwargs": arguments}
    return timm_config(vision, {f"visual.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()})


def test_what_a_trunk_is_read_as():
    config = read("eva02_base_patch16_clip_224", num_heads=2, img_size=28)
    assert config.to_dict() == HfvlmCLIPEVA02Config(**VIT).to_dict()
    assert read("vit_large_patch14_clip_quickgelu_224", num_heads=2).hidden_act == "quick_gelu"
    with pytest.raises(UnsupportedOriginalError, match=r"ref_feat_shape \[2, 3\] is not square"):
        read("eva02_base_patch16_clip_224", num_heads=2, ref_feat_shape=[2, 3])


def test_what_is_not_written_out_timm_runs():
    """Another pooling, a head of open_clip's, an option that is no size, and another model."""
    for config in (
        read("eva02_base_patch16_clip_224", pool="avg"),
        read("eva02_base_patch16_clip_224", proj="linear"),
        read("eva02_base_patch16_clip_224", patch_drop_rate=0.1),
        read("vit_base_mci_224"),
    ):
        assert isinstance(config, HfvlmTimmTrunkConfig)
        assert (config.hidden_size, config.projection_dim) == (32, 16)
        assert config.model_args["global_pool"] in ("token", "avg")
    with pytest.raises(UnsupportedOriginalError, match="vit_base_mci_224 with timm_proj 'none' has no projection"):
        timm_config({"timm_model_name": "vit_base_mci_224", "timm_proj": "none"}, {})
