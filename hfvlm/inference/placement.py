"""Where models compute, and in which precision."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def find_device(device: str | torch.device) -> torch.device:
    """Return the device of a name; "auto" is a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    found = torch.accelerator.current_accelerator()
    if device == "auto":
        return found or torch.device("cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is none: use auto, cpu, cuda or cuda:0.") from error
    if wanted.type not in ("cpu", "meta") and (found is None or found.type != wanted.type):
        raise ValueError(f"device {device}: this machine has none that PyTorch sees; use cpu or auto.")
    return wanted


def check_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return a precision of weights, "auto" or a floating type.

    Raises:
        ValueError: it is another.
    """
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype == "auto" or (isinstance(kind, torch.dtype) and kind.is_floating_point):
        return dtype
    raise ValueError(f"dtype {dtype!r} is no precision of weights: use auto, float32, bfloat16 or float16.")


def placed(inputs: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Move a batch's inputs to a model's device, and those that are no integers to its precision."""
    moved = {name: value.to(model.device, non_blocking=True) for name, value in inputs.items()}
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in moved.items()}
