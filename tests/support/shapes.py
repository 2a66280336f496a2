"""Models of full size without their numbers, each built once a session."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedConfig

from hfvlm.release.plans import empty_model

_MADE: dict[tuple[type, str], tuple[Mapping[str, Tensor], int]] = {}


def shapes_of(config: PreTrainedConfig) -> tuple[Mapping[str, Tensor], int]:
    """The state dict of a model, of meta tensors, and how many parameters it has."""
    key = type(config), config.to_json_string(use_diff=False)
    if key not in _MADE:
        model = empty_model(config)
        _MADE[key] = model.state_dict(), sum(p.numel() for p in model.parameters())
    return _MADE[key]
