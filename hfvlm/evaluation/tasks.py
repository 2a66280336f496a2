"""The evaluations of `hfvlm eval`: each takes a model's folder and data, and returns a Report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfvlm.evaluation.any_to_any import any_to_any
from hfvlm.evaluation.classifiers import classification
from hfvlm.evaluation.clip_score import clip_score
from hfvlm.evaluation.data import Data
from hfvlm.evaluation.embedding import few_shot, linear_probe, retrieval, zero_shot
from hfvlm.evaluation.generating import caption, vqa
from hfvlm.evaluation.grounding import grounding
from hfvlm.evaluation.hallucination import hallucination
from hfvlm.evaluation.painted import depth, restoration, segmentation
from hfvlm.evaluation.report import Report

__all__ = ["TASKS", "Data", "evaluate"]

TASKS: dict[str, Callable[..., Report]] = {
    "zero-shot": zero_shot,
    "retrieval": retrieval,
    "linear-probe": linear_probe,
    "few-shot": few_shot,
    "classification": classification,
    "caption": caption,
    "vqa": vqa,
    "grounding": grounding,
    "any-to-any": any_to_any,
    "hallucination": hallucination,
    "clip-score": clip_score,
    "segmentation": segmentation,
    "depth": depth,
    "restoration": restoration,
}
# Those that read media by the options of a modality.
WITH_SOURCE_OPTIONS = ("zero-shot", "retrieval", "linear-probe", "few-shot", "any-to-any")


def evaluate(task: str, folder: str | Path, data: Data, **options: Any) -> Report:
    """Run one of TASKS. Rows that cannot be read are left out, and counted in the report.

    Raises:
        ValueError: there is no such task, the data lack a column or have options that it takes not, or no row can be
            read.
    """
    if task not in TASKS:
        raise ValueError(f"No task is called {task!r}; there are {', '.join(TASKS)}.")
    if data.source_options and task not in WITH_SOURCE_OPTIONS:
        raise ValueError(f"source_options go with {', '.join(WITH_SOURCE_OPTIONS)}, not {task}.")
    return TASKS[task](str(folder), data, **options)
