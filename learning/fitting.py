"""How small models are made, trained and asked: the same for every entry."""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

import hfvlm

EXAMPLES = Path(__file__).parents[1] / "examples"
Batch = dict[str, Tensor]


@functools.cache
def example(name: str) -> ModuleType:
    """Import a script of examples/."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def untrained(architecture: str, seed: int, model: str | None = None) -> tuple[Any, Any]:
    """Make an architecture's tiny model, with weights by chance, and its processor."""
    with TemporaryDirectory() as folder:
        path = hfvlm.untrained(architecture, Path(folder) / "model", model=model, seed=seed)
        return AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)


def steps_of(count: int, effort: float) -> int:
    """Return the number of steps at an effort."""
    return max(2, round(count * effort))


def count_of(count: int, effort: float) -> int:
    """Return the number of examples at an effort: all from a tenth of the steps on, at less a share, one at least."""
    return max(1, round(count * min(1.0, 10 * effort)))


def fit(
    model: Any,
    batch: Callable[[], Batch],
    steps: int,
    *,
    rate: float = 2e-3,
    loss_of: Callable[[Any, Batch], Tensor] | None = None,
) -> None:
    """Train what requires gradients, by the model's own loss of each batch, and leave the model in inference mode."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        inputs = batch()
        loss = model(**inputs).loss if loss_of is None else loss_of(model, inputs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        bound = getattr(model, "bound_temperatures", None)
        if bound is not None:
            bound()
    model.eval()


def rows_of(inputs: Batch, random: np.random.RandomState, size: int = 32) -> Callable[[], Batch]:
    """Return a function that draws batches of rows that were prepared before."""
    count = len(next(iter(inputs.values())))

    def draw() -> Batch:
        rows = torch.from_numpy(random.permutation(count)[: min(size, count)])
        return {name: value[rows] for name, value in inputs.items()}

    return draw


def grey(images: Sequence[Any]) -> list[Any]:
    """Return as many grey images, or videos, as there are."""
    return [
        np.full_like(image, 128) if isinstance(image, np.ndarray) else Image.new("RGB", image.size, (128, 128, 128))
        for image in images
    ]


def equal(said: Sequence[str], truth: Sequence[str]) -> np.ndarray:
    """Mark which answers are right."""
    return np.array([a.strip() == b for a, b in zip(said, truth, strict=True)], dtype=float)
