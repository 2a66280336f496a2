"""The evaluations of `hfvlm eval`: each takes a model's folder and data, and returns a Report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfvlm.evaluation.data import Data
from hfvlm.evaluation.embedding import few_shot, linear_probe, retrieval, zero_shot
from hfvlm.evaluation.generating import caption, vqa
from hfvlm.evaluation.grounding import grounding
from hfvlm.evaluation.painted import depth, restoration, segmentation
from hfvlm.evaluation.report import Report

__all__ = ["TASKS", "Data", "evaluate"]

TASKS: dict[str, Callable[..., Report]] = {
    "zero-shot": zero_shot,
    "retrieval": retrieval,
    "linear-probe": linear_probe,
    "few-shot": few_shot,
    "caption": caption,
    "vqa": vqa,
    "grounding": grounding,
    "segmentation": segmentation,
    "depth": depth,
    "restoration": restoration,
}


def evaluate(task: str, folder: str | Path, data: Data, **options: Any) -> Report:
    """Run one of TASKS. Rows that cannot be read are left out, and counted in the report.

    Raises:
        ValueError: there is no such task, the data lack a column, or no row can be read.
    """
    if task not in TASKS:
        raise ValueError(f"No task is called {task!r}; there are {', '.join(TASKS)}.")
    return TASKS[task](str(folder), data, **options)
