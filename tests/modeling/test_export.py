"""Exported towers take batches of any size, and texts of any length (`torch.export`; what ONNX is made from)."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from transformers import AutoModel

from hfvlm.presets import load_preset
from hfvlm.release.onnx import Graph, check_graph, free_sizes, prepared
from tests.support.folders import parts_of
from tests.support.suite import shallow
from tests.support.towers import TOWERS, own_modalities

# One of each kind of tower. `make integrations` writes all of them as ONNX graphs.
ARCHITECTURES = ("blip2", "clip", "coca", "imagebind", "siglip", "wukong")
WITH_TOWERS = ("clip-convnext", "clip-eva02", "siglip-naflex")


class Program:
    """An exported program, where ONNX Runtime is compared with the model."""

    def __init__(self, module, names):
        self.module, self.names = module, names

    def embeddings(self, modality, **inputs):
        return self.module(*(inputs[name] for name in self.names))


@pytest.mark.parametrize("name", [*ARCHITECTURES, *WITH_TOWERS])
def test_embeddings_are_exported_with_free_sizes(name):
    """Of every modality, each by its tower alone: what `hfvlm export --to onnx` makes graphs of."""
    whole, processor = parts_of(name)
    model = AutoModel.from_config(shallow(whole.config)).eval()
    known = own_modalities(name) if name in TOWERS else getattr(model, "modalities", processor.modalities)
    assert known
    for modality in known:
        inputs = prepared(processor, modality, [0, 1])
        graph, names = Graph(model, modality, list(inputs)).eval(), list(inputs)
        with torch.no_grad():
            program = export(graph, tuple(inputs.values()), dynamic_shapes=(free_sizes(names),), strict=False)

        check_graph(Program(program.module(), names), model, processor, modality)


@cache
def flava():
    torch.manual_seed(0)
    return AutoModel.from_config(shallow(load_preset("flava/tiny").make_config())).eval()


class Output(nn.Module):
    """One tensor of a tower's output."""

    def __init__(self, tower, name):
        super().__init__()
        self.tower, self.name = tower, name

    def forward(self, *values):
        return getattr(self.tower(*values), self.name)


@pytest.mark.parametrize(("name", "output"), [("multimodal_model", "pooler_output"), ("codebook_model", "codes")])
def test_what_flava_has_next_to_its_towers(name, output):
    tower = Output(getattr(flava(), name), output).eval()

    def values(rows):
        config = tower.tower.config
        if name == "codebook_model":
            return (torch.randn(rows, config.num_channels, 64, 64),)
        return tuple(torch.randn(rows, n, config.image_hidden_size) for n in (17, 8))

    free = ({0: Dim("batch", min=1, max=64)},) * len(values(2))
    program = export(tower, values(2), dynamic_shapes=(free,), strict=False)
    with torch.no_grad():
        for rows in (1, 5):
            given = values(rows)
            torch.testing.assert_close(program.module()(*given), tower(*given), rtol=1e-4, atol=1e-5)
