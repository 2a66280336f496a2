"""The metrics as `evaluate.Metric`, for code that adds predictions batch by batch; nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from hfvlm.evaluation import answering, captioning, classification
from hfvlm.evaluation.retrieval import ranks_of_best

TEXTS = {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
CLASSES = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
SCORES = {
    "predictions": datasets.Sequence(datasets.Value("float64")),
    "references": datasets.Sequence(datasets.Value("bool")),
}
KS = (1, 5, 10)


def recall(scores: np.ndarray, positives: np.ndarray) -> dict[str, float]:
    """Return recall@k of queries by candidates, as `hfvlm.evaluation.retrieval.recall_at`."""
    ranks = ranks_of_best(torch.from_numpy(scores), torch.from_numpy(positives))
    return {f"recall@{k}": (ranks < k).double().mean().item() for k in KS}


# What each takes: texts and references; classes; or a row of scores and a mask of the positives.
METRICS: dict[str, tuple[dict[str, Any], Callable[[Any, Any], Any]]] = {
    "bleu": (TEXTS, lambda p, r: {f"bleu_{n + 1}": score for n, score in enumerate(captioning.bleu(p, r))}),
    "rouge_l": (TEXTS, captioning.rouge_l),
    "cider": (TEXTS, captioning.cider),
    "vqa_accuracy": (TEXTS, answering.vqa_accuracy),
    "mean_per_class_accuracy": (
        CLASSES,
        lambda p, r: classification.mean_per_class_accuracy(np.array(p), np.array(r)),
    ),
    "mean_average_precision": (
        SCORES,
        lambda p, r: classification.mean_average_precision(np.array(p), np.array(r, bool)),
    ),
    "recall": (SCORES, lambda p, r: recall(np.array(p), np.array(r, bool))),
}


class VisionLanguageMetric(evaluate.Metric):
    """One of METRICS; its name is the configuration's."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(METRICS[self.config_name][0])
        return evaluate.MetricInfo(description=f"hfvlm's {self.config_name}.", citation="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        found = METRICS[self.config_name][1](predictions, references)
        return found if isinstance(found, dict) else {self.config_name: found}


def load_metric(name: str) -> VisionLanguageMetric:
    """Load a metric by its name, one of METRICS.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in METRICS:
        raise ValueError(f"No metric is called {name!r}; there are {', '.join(METRICS)}.")
    return VisionLanguageMetric(config_name=name)
