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
        labelled: whether every row has a label; else those without the column have none, as where a teacher labels.
    """

    def __init__(
        self,
        processor: Any,
        column: str,
        label_column: str,
        numbers: Mapping[Any, int],
        *,
        augment: Any = None,
        labelled: bool = True,
    ):
        super().__init__(processor, {"image": column}, augment=augment)
        self.label_column, self.numbers, self.labelled = label_column, dict(numbers), labelled
        self.image_processor = getattr(processor, "image_processor", processor)

    def read(self, row: Mapping[str, Any], random: np.random.Generator | None) -> dict[str, Any]:
        """Read a row: its image, its label's number, and whether it is for training.

        Raises:
            KeyError: the label is none of those of training.
        """
        found = super().read(row, random) | {"label": IGNORE, "training": random is not None}
        if self.labelled or self.label_column in row:
            label = row[self.label_column]
            if label not in self.numbers:
                raise KeyError(f"{self.label_column} {label!r} is no label of the rows that are trained on.")
            found["label"] = self.numbers[label]
        return found

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

    Of a model without a classifier of its own, as LLaVA, it is that of the architecture whose tower it has.

    Raises:
        ValueError: hfvlm has no classifier of this model or of its tower, or the folder lacks a part of the tower.
    """
    config = AutoConfig.from_pretrained(folder)
    labels = {"num_labels": len(names), "id2label": dict(enumerate(names))}
    labels["label2id"] = {name: i for i, name in enumerate(names)}
    if own := classifiers_of(config):
        named = [name for name in own if name in (config.architectures or ())]
        return find_class((named or own)[0]).from_pretrained(folder, ignore_mismatched_sizes=True, **labels)
    whole = owner_of_tower(config)
    if whole is None:
        raise ValueError(f"{folder}: hfvlm has no image classifier of {type(config).__name__}.")
    kind = find_class(classifiers_of(whole)[0])
    whole.id2label, whole.label2id = labels["id2label"], labels["label2id"]
    model, info = kind.from_pretrained(folder, config=whole, output_loading_info=True)
    if lacking := sorted(key for key in info["missing_keys"] if not key.startswith("classifier.")):
        raise ValueError(f"{folder}: its tower lacks {lacking[0]}, which {kind.__name__} has.")
    return model


def classifiers_of(config: Any) -> list[str]:
    """Return the names of the image classifiers whose configuration is of this kind."""
    kinds = architecture_of(config.model_type).models.get(AUTO, ())
    return [name for name in kinds if type(config) is find_class(name).config_class]


def owner_of_tower(config: Any) -> Any:
    """Return a configuration with the same tower of images, of an architecture that has a classifier, if there is
    one."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return None
    kinds = architecture_of(vision.model_type).models.get(AUTO, ())
    wholes = [find_class(name).config_class for name in kinds]
    for whole in wholes:
        if whole.sub_configs.get("vision_config") is type(vision):
            # The joint space, which a classifier leaves out, must be one, of towers that have one.
            own = whole().vision_config
            joint = {"projection_dim": own.projection_dim} if hasattr(own, "projection_dim") else {}
            return whole(vision_config=vision.to_dict() | joint)
    return None
