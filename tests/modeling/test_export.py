"""Exported towers take batches of any size (`torch.export`; what ONNX and others are made from)."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from transformers import AutoModel, PreTrainedModel

import hfvlm
from hfvlm.presets import load_preset
from tests.support.suite import shallow

TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16}
ARCHITECTURES = (
    "align", "blip", "blip2", "clip", "coca", "filip", "flava", "imagebind", "languagebind", "mammut", "siglip",
    "wukong",
)  # fmt: skip


@cache
def model_of(architecture):
    torch.manual_seed(0)
    if architecture == "clip_resnet":
        sizes = {
            "image_size": 64,
            "stem_size": 8,
            "depths": [1, 2, 1, 1],
            "projection_dim": 16,
            "num_attention_heads": 4,
        }
        vision = {"model_type": "hfvlm_clip_resnet"} | sizes
        return hfvlm.HfvlmCLIPModel(hfvlm.HfvlmCLIPConfig(vision_config=vision, text_config=TEXT)).eval()
    return AutoModel.from_config(shallow(load_preset(f"{architecture}/tiny").make_config())).eval()


def towers():
    """Every tower of every architecture whose towers are public, and a CLIP-ResNet."""
    for architecture in ARCHITECTURES:
        for name, child in model_of(architecture).named_children():
            if isinstance(child, PreTrainedModel) and name not in ("language_model", "qformer_model"):
                yield architecture, name
    yield "clip_resnet", "vision_model"


class Pooled(nn.Module):
    """One tensor of a tower's output."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, *values):
        output = self.tower(*values)
        found = [getattr(output, name, None) for name in ("embeds", "codes", "pooler_output", "last_hidden_state")]
        return next(tensor for tensor in found if tensor is not None)


def values_for(tower, rows):
    """A batch for a tower."""
    torch.manual_seed(rows)
    config = tower.config
    if tower.main_input_name == "input_ids":
        return (torch.randint(3, config.vocab_size - 3, (rows, min(config.max_position_embeddings, 8))),)
    if tower.main_input_name == "image_tokens":
        return tuple(torch.randn(rows, n, config.image_hidden_size) for n in (17, 8))
    size, channels = getattr(config, "image_size", 64), config.num_channels if hasattr(config, "num_channels") else 1
    height, width = (size, size) if isinstance(size, int) else size
    shapes = {
        "pixel_values_videos": (3, getattr(config, "num_frames", None), height, width),
        "input_features": (channels, getattr(config, "num_mel_bins", height), getattr(config, "num_frames", width)),
        "imu_values": (6, 2000),
    }
    return (torch.randn(rows, *shapes.get(tower.main_input_name, (channels, height, width))),)


@pytest.mark.parametrize(("architecture", "name"), list(towers()))
def test_a_tower_is_exported_with_a_free_batch(architecture, name):
    tower = Pooled(getattr(model_of(architecture), name)).eval()
    few, many = values_for(tower.tower, 2), values_for(tower.tower, 5)
    free = ({0: Dim("batch", min=1, max=64)},) * len(few)
    program = export(tower, few, dynamic_shapes=(free,), strict=False)
    with torch.no_grad():
        for values in (few, many, tuple(value[:1] for value in many)):
            torch.testing.assert_close(program.module()(*values), tower(*values), rtol=1e-4, atol=1e-5)
