"""Metrics of texts as `evaluate.Metric`, for code that adds predictions batch by batch; nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate

from hfvlm.evaluation import answering, captioning

METRICS: dict[str, Callable[[list[str], list[list[str]]], Any]] = {
    "bleu": lambda texts, references: {f"bleu_{n + 1}": s for n, s in enumerate(captioning.bleu(texts, references))},
    "rouge_l": lambda texts, references: {"rouge_l": captioning.rouge_l(texts, references)},
    "cider": lambda texts, references: {"cider": captioning.cider(texts, references)},
    "vqa_accuracy": lambda texts, references: {"vqa_accuracy": answering.vqa_accuracy(texts, references)},
}


class TextMetric(evaluate.Metric):
    """Texts beside those that people wrote; its name is the configuration's, one of METRICS."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Value("string"),
            "references": datasets.Sequence(datasets.Value("string")),
        }
        return evaluate.MetricInfo(
            description="Texts beside those that people wrote.", citation="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        return METRICS[self.config_name](predictions, references)


def load_metric(name: str) -> TextMetric:
    """A metric by its name: "bleu", "rouge_l", "cider" or "vqa_accuracy".

    Raises:
        ValueError: there is none of that name.
    """
    if name not in METRICS:
        raise ValueError(f"No metric is called {name!r}; there are {', '.join(METRICS)}.")
    return TextMetric(config_name=name)
