"""Models of full size without their numbers, each built once a session."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from hfvlm.release.plans import new_model

_MADE: dict[tuple[type, str], tuple[Mapping[str, Tensor], int]] = {}


def shapes_of(config: PreTrainedConfig) -> tuple[Mapping[str, Tensor], int]:
    """The state dict of a model, of meta tensors, and how many parameters it has."""
    key = type(config), config.to_json_string(use_diff=False)
    if key not in _MADE:
        with torch.device("meta"), no_init_weights():  # initialising what has no memory takes a third of the time
            model = new_model(config)
        model.tie_weights()
        _MADE[key] = model.state_dict(), sum(p.numel() for p in model.parameters())
    return _MADE[key]
