"""Batches of questions about images or videos with several answers each, for models that choose one, and how often
they choose the right one."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import EvalPrediction

from hfvlm.checks.ranges import check_integer
from hfvlm.media.images import read_image
from hfvlm.training.classification import accuracies

# The columns of a question; those of the question why it is answered so; see `ChoiceCollator`.
COLUMNS = ("question", "choices", "label")
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

    needed: ClassVar[tuple[str, ...]] = ("image", *COLUMNS)
    optional: ClassVar[tuple[str, ...]] = REASONS

    def __init__(self, processor: Any, columns: Mapping[str, str] | None = None, **options: Any):
        self.processor, self.columns, self.options = processor, dict(columns or {}), options

    def read(self, row: Mapping[str, Any], random: np.random.Generator | None) -> dict[str, Any]:
        """Read a row; nothing is random.

        Raises:
            KeyError: the data set has no such column.
            ValueError: the right answer is none of the answers.
        """
        found = self.values(row)
        return found | {"image": read_image(found["image"], upright=self.processor.image_processor.upright)}

    def values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row's values by the names of the columns, those that are there."""
        own = {name: self.columns.get(name, name) for name in (*self.needed, *self.optional)}
        if missing := [own[name] for name in self.needed if own[name] not in row]:
            raise KeyError(f"The data set has no column {', '.join(missing)}; it has {', '.join(row)}.")
        found = {name: row[column] for name, column in own.items() if row.get(column) is not None}
        for answers, label in (("choices", "label"), REASONS):
            if answers in found and not 0 <= int(found.get(label, -1)) < len(found[answers]):
                raise ValueError(f"{own[label]} {found.get(label)} is none of the {len(found[answers])} {answers}.")
        return found

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows of `Rows`, or of a data set, to the model's inputs, `labels` and, of `Rows`, "replaced"."""
        read = rows if "replaced" in rows[0] else [self.read(row, None) for row in rows]
        replaced = {"replaced": torch.tensor([row["replaced"] for row in read])} if read is rows else {}
        return {**self.batch(read), **replaced}

    def batch(self, read: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make the model's inputs and `labels` of rows that are read."""
        column = {name: [row[name] for row in read] for name in read[0]}
        labels = torch.tensor(column["label"])
        why = {"reasons": column["reasons"], "labels": column["label"]} if "reasons" in column else {}
        inputs = self.processor.questions(
            column["image"], column["question"], column["choices"], **why, **self.options
        )
        labels = torch.stack([labels, torch.tensor(column["reason_label"])], dim=1) if why else labels
        return {**inputs, "labels": labels}


class VideoChoiceCollator(ChoiceCollator):
    """Collator of rows with a video, a question, its answers and the number of the right one to the inputs of a model
    that chooses by frames, subtitles and audio, by its processor's `moment` and `video_question`, and `labels`.

    Rows may have the `audio` of videos of frames, the `start` and `end` of the moment that the question is about, in
    seconds, and `subtitles`, each with its `start`, `end` and `text`, as in TVQA.

    Args:
        processor: of the model.
        columns: {"video": "clip", "choices": "answers"}: the columns; by default they have the names above.
        num_segments: of a video.
        **options: of `video_question`, as `max_length`.
    """

    needed = ("video", *COLUMNS)
    optional = ("audio", "start", "end", "subtitles")

    def __init__(
        self, processor: Any, columns: Mapping[str, str] | None = None, *, num_segments: int = 7, **options: Any
    ):
        super().__init__(processor, columns, **options)
        self.num_segments = check_integer("num_segments", num_segments)

    def read(self, row: Mapping[str, Any], random: np.random.Generator | None) -> dict[str, Any]:
        """Read a row -> the model's inputs in a batch of one, and its label; nothing is random.

        Raises:
            KeyError: the data set has no such column.
            MediaError: the video cannot be read, or has no audio.
            ValueError: the right answer is none of the answers, or a moment lacks its beginning or its end.
        """
        found, span = self.values(row), None
        if "start" in found or "end" in found:
            if not ("start" in found and "end" in found):
                raise ValueError("A moment needs both start and end, in seconds.")
            span = float(found["start"]), float(found["end"])
        segments, place = self.processor.moment(
            found["video"],
            found.get("audio"),
            span=span,
            subtitles=found.get("subtitles") or (),
            num_segments=self.num_segments,
        )
        inputs = self.processor.video_question(
            segments,
            found["question"],
            found["choices"],
            place,
            num_segments=self.num_segments,
            **self.options,
        )
        return {**inputs, "labels": torch.tensor([int(found["label"])])}

    def batch(self, read: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Put rows that are read into one batch."""
        if len(counts := {row["input_ids"].shape[1] for row in read}) > 1:
            raise ValueError(f"choices: the questions of a batch need as many, not {sorted(counts)}.")
        names = [name for name, value in read[0].items() if isinstance(value, torch.Tensor)]
        return {name: torch.cat([row[name] for row in read]) for name in names}


def choice_accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """Compute the share of questions whose highest score, `(B, C)` or of several questions `(B, Q, C)`, is the right
    answer's."""
    outputs = prediction.predictions  # of a model with further ones the logits come first
    labels, logits = (
        np.asarray(prediction.label_ids),
        np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs),
    )
    flat = EvalPrediction(predictions=logits.reshape(-1, logits.shape[-1]), label_ids=labels.reshape(-1))
    return {"accuracy": accuracies(flat)["accuracy"]}
