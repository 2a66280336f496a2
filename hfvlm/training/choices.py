"""Batches of questions with several answers each, for models that choose one, and how often they choose the right
one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from hfvlm.media.images import read_image
from hfvlm.training.classification import accuracies

# The columns of a question about an image; those of the question why it is answered so; see `ChoiceCollator`.
COLUMNS = ("image", "question", "choices", "label")
REASONS = ("reasons", "reason_label")


class ChoiceCollator:
    """Collator of rows with an image, a question, its answers and the number of the right one to the inputs of a model
    that chooses an answer, by its processor's `questions`, and `labels`.

    Rows may have reasons of the right answer, too, with the number of the right one (`reasons`, `reason_label`): then
    each is two questions, as in VCR.

    Args:
        processor: of the model.
        columns: {"image": "photo", "choices": "answers"}: the columns; by default they have the names above.
        **options: of `questions`, as `max_length`.
    """

    def __init__(self, processor: Any, columns: Mapping[str, str] | None = None, **options: Any):
        self.processor, self.columns, self.options = processor, dict(columns or {}), options

    def read(self, row: Mapping[str, Any], random: np.random.Generator | None) -> dict[str, Any]:
        """Read a row; nothing is random.

        Raises:
            KeyError: the data set has no such column.
            ValueError: the right answer is none of the answers.
        """
        own = {name: self.columns.get(name, name) for name in (*COLUMNS, *REASONS)}
        if missing := [own[name] for name in COLUMNS if own[name] not in row]:
            raise KeyError(f"The data set has no column {', '.join(missing)}; it has {', '.join(row)}.")
        found = {name: row[column] for name, column in own.items() if row.get(column) is not None}
        found["image"] = read_image(found["image"], upright=self.processor.image_processor.upright)
        for answers, label in (("choices", "label"), REASONS):
            if answers in found and not 0 <= int(found.get(label, -1)) < len(found[answers]):
                raise ValueError(f"{own[label]} {found.get(label)} is none of the {len(found[answers])} {answers}.")
        return found

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows of `Rows`, or of a data set, to the model's inputs, `labels` and, of `Rows`, "replaced"."""
        read = rows if "replaced" in rows[0] else [self.read(row, None) for row in rows]
        column = {name: [row[name] for row in read] for name in read[0]}
        labels = torch.tensor(column["label"])
        why = {"reasons": column["reasons"], "labels": column["label"]} if "reasons" in column else {}
        inputs = self.processor.questions(
            column["image"], column["question"], column["choices"], **why, **self.options
        )
        labels = torch.stack([labels, torch.tensor(column["reason_label"])], dim=1) if why else labels
        replaced = {"replaced": torch.tensor(column["replaced"])} if read is rows else {}
        return {**inputs, "labels": labels, **replaced}


def choice_accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """Compute the share of questions whose highest score, `(B, C)` or of several questions `(B, Q, C)`, is the right
    answer's."""
    labels, logits = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
    flat = EvalPrediction(predictions=logits.reshape(-1, logits.shape[-1]), label_ids=labels.reshape(-1))
    return {"accuracy": accuracies(flat)["accuracy"]}
