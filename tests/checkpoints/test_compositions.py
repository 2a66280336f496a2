"""Adapters and differences that do not belong to their base are refused by name."""

import pytest
import torch

from hfvlm.checkpoints import CheckpointError
from hfvlm.checkpoints.compositions import add_delta, merge_lora

BASE = {"layer.weight": torch.ones(4, 3), "bias": torch.zeros(3)}
NAME = "base_model.model.layer.lora_{}.weight"
ADAPTER = {NAME.format("A"): torch.ones(2, 3), NAME.format("B"): torch.ones(4, 2)}
SETTINGS = {"r": 2, "lora_alpha": 4}


def test_an_adapter_is_merged():
    assert torch.equal(merge_lora(BASE, ADAPTER, SETTINGS)["layer.weight"], torch.full((4, 3), 5.0))


@pytest.mark.parametrize(
    "settings",
    [{}, {"r": 0, "lora_alpha": 1}, {"r": 2}, {"r": "2", "lora_alpha": 1}, {"r": 2, "lora_alpha": None}, {"r": True}],
)
def test_settings_without_a_rank(settings):
    with pytest.raises(CheckpointError, match="adapter_config.json: r .*, lora_alpha"):
        merge_lora(BASE, ADAPTER, settings)


@pytest.mark.parametrize(
    ("half", "shape"), [("A", (3,)), ("A", (3, 3)), ("A", ()), ("B", (4,)), ("B", (4, 3)), ("A", (2, 3, 1))]
)
def test_halves_of_another_shape(half, shape):
    with pytest.raises(CheckpointError, match="adapter: 'layer.weight' has no lora_A and lora_B of rank 2"):
        merge_lora(BASE, ADAPTER | {NAME.format(half): torch.ones(shape)}, SETTINGS)


def test_another_base():
    with pytest.raises(CheckpointError, match="adapts no weight of the base"):
        merge_lora({"other.weight": torch.ones(4, 3)}, ADAPTER, SETTINGS)
    with pytest.raises(CheckpointError, match="the wrong base"):
        merge_lora(BASE | {"layer.weight": torch.ones(5, 3)}, ADAPTER, SETTINGS)
    with pytest.raises(CheckpointError, match="the wrong base"):
        add_delta(BASE, BASE | {"bias": torch.zeros(3, 1)})
