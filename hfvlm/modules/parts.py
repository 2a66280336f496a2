"""A tower over the frames of videos, a part of them at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

# Frames that a tower encodes together: enough to fill a device, and no more memory for a longer video.
FRAMES = 32


def in_parts(tower: Callable[..., Any], values: Tensor, frames: int = 1, **kwargs: Any) -> Any:
    """Run a tower over a batch, `FRAMES` frames at a time where nothing is trained.

    Rows of a batch do not influence each other, so the parts' outputs, joined, are those of the whole.

    Args:
        tower: gives an output whose tensors have the batch as their first dimension.
        values: `(B, ...)`.
        frames: of each row.
        **kwargs: of the tower.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return tower(values, **kwargs)
    rows = max(FRAMES // frames, 1)
    if values.shape[0] <= rows:
        return tower(values, **kwargs)
    return joined([tower(part, **kwargs) for part in values.split(rows)])


def joined(outputs: Sequence[ModelOutput]) -> ModelOutput:
    """Join the outputs of parts of a batch to the output of all of it."""
    first = outputs[0]
    return type(first)(**{name: _joined([output[name] for output in outputs]) for name in first})


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    return tuple(_joined(list(each)) for each in zip(*values, strict=True))
