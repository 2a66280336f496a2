"""Which parameters a run has moved."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfvlm.writing import replaced

logger = logging.getLogger(__name__)

FILE = "moved.json"
Sums = dict[str, tuple[float, float]]


@torch.no_grad()
def sums_of(model: nn.Module) -> Sums:
    """Return two sums of each parameter, in float64, by which it is seen to have moved without a copy of it; of a
    sharded one those of this process's part."""
    return {name: sums(parameter) for name, parameter in model.named_parameters()}


def sums(parameter: Tensor) -> tuple[float, float]:
    """Return the sum of a tensor's numbers, and the root of the sum of their squares."""
    own: Tensor = getattr(parameter, "to_local", lambda: parameter)()
    if not own.is_floating_point():  # weights in 4 bits
        own = own.float()
    return own.sum(dtype=torch.float64).item(), torch.linalg.vector_norm(own, dtype=torch.float64).item()


def moved_since(before: Sums, model: nn.Module) -> list[str]:
    """Return the names of the parameters that are not as they were, in the model's order."""
    return [name for name, now in sums_of(model).items() if before.get(name) != now]


def report(before: Sums, model: nn.Module, folder: Path) -> dict[str, Any]:
    """Log how many parameters of each part of a model have moved, and write their names into moved.json.

    Args:
        before: of `sums_of` before the run.
        model: after it.
        folder: for the file.
    """
    moved = set(moved_since(before, model))
    parts: dict[str, list[int]] = {}
    for name in before:
        counts = parts.setdefault(part_of(name), [0, 0])
        counts[0] += name in moved
        counts[1] += 1
    found = {"parts": parts, "moved": [name for name in before if name in moved]}
    logger.info("Moved: %s.", ", ".join(f"{part} {count} of {total}" for part, (count, total) in parts.items()))
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / FILE) as path:
        path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def part_of(name: str) -> str:
    """Return the part of a model that a parameter is in: the first of its name, behind what PEFT puts there."""
    return name.removeprefix("base_model.model.").partition(".")[0]
