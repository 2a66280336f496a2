"""timm's Swin, and the conversion of Microsoft's."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModel, SwinConfig, SwinForImageClassification

from hfvlm.checkpoints.key_table import convert_keys, restore_keys
from hfvlm.conversion.swin import keys_for
from hfvlm.models.clip import (
    HfvlmCLIPSwinConfig,
    HfvlmCLIPSwinModel,
    HfvlmCLIPSwinV2Config,
    HfvlmCLIPSwinV2Model,
)
from tests.support.suite import PartSuite, close

SIZES = {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
SIZES |= {"projection_dim": 12, "initializer_range": 0.2}


class TestSwin(PartSuite):
    model_class, auto_class = HfvlmCLIPSwinModel, AutoModel
    records = ("hidden_states",)
    implementations = ("eager", "sdpa")

    def config(self):
        return HfvlmCLIPSwinConfig(**SIZES)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 32, 32)}

    def test_equals_transformers_on_maps_of_whole_windows(self, model, batch):
        native = SwinForImageClassification(
            SwinConfig(**{k: v for k, v in SIZES.items() if k != "projection_dim"}, patch_size=4, num_labels=12)
        ).eval()
        native.config.architectures = ["SwinForImageClassification"]
        weights = {key: t for key, t in native.state_dict().items() if not key.endswith("relative_position_index")}
        original = restore_keys(weights, keys_for(native.config))
        timm = {key.replace("head.", "head.fc."): tensor for key, tensor in original.items()}
        timm = {key.replace("layers.0.downsample", "layers.1.downsample"): tensor for key, tensor in timm.items()}
        timm.pop("head.fc.bias")
        rows = keys_for(model.config, "timm")
        model.load_state_dict(convert_keys(timm, rows, model.state_dict()))
        native.classifier.bias.data.zero_()
        with torch.no_grad():
            close(model(**batch).embeds, native(**batch).logits, 1e-5, "logits")

    def test_any_size(self, model):
        assert model(torch.randn(1, 3, 52, 44)).last_hidden_state.shape == (1, 7 * 6, 32)

    def test_heads_must_divide_the_widths(self):
        with pytest.raises(StrictDataclassClassValidationError, match="do not divide the widths"):
            HfvlmCLIPSwinConfig(**SIZES | {"num_heads": [2, 5]})


class TestSwinV2(PartSuite):
    model_class, auto_class = HfvlmCLIPSwinV2Model, AutoModel
    records = ("hidden_states",)
    implementations = ("eager", "sdpa")

    def config(self):
        return HfvlmCLIPSwinV2Config(**SIZES | {"initializer_range": 0.02}, pretrained_windows=[3, 0])

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 32, 32)}
