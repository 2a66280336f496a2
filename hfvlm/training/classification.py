"""Training image classifiers on labelled images: linear probes and fine-tuning."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, EvalPrediction

from hfvlm.processing.assembly import IGNORE
from hfvlm.registry import architecture_of, find_class
from hfvlm.training.data import ContrastiveCollator
from hfvlm.training.row_trainer import RowTrainer

AUTO = "AutoModelForImageClassification"
# Of accuracy@k.
BEST = 5


class LabelCollator(ContrastiveCollator):
    """Collator of labelled images to `pixel_values` and `labels`.

    Args:
        processor: of the model, with an `image_processor`, or that itself.
        column: of the images.
        label_column: of the labels, names or numbers.
        numbers: of the labels, from 0.
        augment: see `ContrastiveCollator`.
    """

    def __init__(
        self, processor: Any, column: str, label_column: str, numbers: Mapping[Any, int], *, augment: Any = None
    ):
        super().__init__(processor, {"image": column}, augment=augment)
        self.label_column, self.numbers = label_column, dict(numbers)
        self.image_processor = getattr(processor, "image_processor", processor)

    def read(self, row: Mapping[str, Any], random: np.random.Generator | None) -> dict[str, Any]:
        """Read a row: its image, its label's number, and whether it is for training.

        Raises:
            KeyError: the label is none of those of training.
        """
        label = row[self.label_column]
        if label not in self.numbers:
            raise KeyError(f"{self.label_column} {label!r} is no label of the rows that are trained on.")
        return super().read(row, random) | {"label": self.numbers[label], "training": random is not None}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows of `Rows`; in evaluations, rows that replace unreadable ones have no label."""
        inputs = self.image_processor([row["image"] for row in rows], return_tensors="pt")
        replaced = torch.tensor([row["replaced"] for row in rows])
        known = [row["label"] if row["training"] or not row["replaced"] else IGNORE for row in rows]
        return {**inputs, "labels": torch.tensor(known), "replaced": replaced}


class ClassificationTrainer(RowTrainer):
    """Trainer of an image classifier, whose evaluations measure its accuracy."""

    training_inputs = {}

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"compute_metrics": accuracies} | options)
        if self.args.label_names is None:
            self.label_names = ["labels"]


def accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """Compute accuracy, and accuracy@5, over rows with labels; scores that are NaN are wrong."""
    labels, logits = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
    known = labels != IGNORE
    labels, logits = labels[known], np.nan_to_num(logits[known], nan=-np.inf)
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    # Equal scores count against it.
    ranks = (logits >= own).sum(axis=1) - 1
    found = {"accuracy": float((ranks < 1).mean())}
    return found | ({f"accuracy@{BEST}": float((ranks < BEST).mean())} if logits.shape[1] > BEST else {})


def labels_of(rows: Any, column: str, source: str) -> tuple[dict[Any, int], list[str]]:
    """Return the number of each label of a data set, and the labels' names.

    Raises:
        ValueError: there is no such column, or fewer than two labels.
    """
    features = rows.features or {}
    if column not in features:
        raise ValueError(f"{source}: has no column {column!r} of labels (label_column); it has {', '.join(features)}.")
    if names := getattr(features[column], "names", None):
        return {i: i for i in range(len(names))}, list(names)
    values = sorted(set(rows[column]))
    if len(values) < 2:
        raise ValueError(f"{source}: the column {column!r} holds one label alone: {values}.")
    return {value: i for i, value in enumerate(values)}, [str(value) for value in values]


def load_classifier(folder: str, names: Sequence[str]) -> Any:
    """Load the image classifier of a model's tower, with a new last layer unless the folder's has as many labels.

    Raises:
        ValueError: hfvlm has no classifier of this model.
    """
    config = AutoConfig.from_pretrained(folder)
    kinds = architecture_of(config.model_type).models.get(AUTO, ())
    known = [name for name in kinds if type(config) is find_class(name).config_class]
    if not known:
        raise ValueError(f"{folder}: hfvlm has no image classifier of {type(config).__name__}.")
    own = [name for name in known if name in (config.architectures or ())]
    labels = {"num_labels": len(names), "id2label": dict(enumerate(names))}
    labels["label2id"] = {name: i for i, name in enumerate(names)}
    kind = find_class((own or known)[0])
    return kind.from_pretrained(folder, ignore_mismatched_sizes=True, **labels)
