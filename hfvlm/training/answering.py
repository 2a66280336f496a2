"""Batches of questions with answers, and of sentences about several images: BLIP's fine-tunings
(https://arxiv.org/abs/2201.12086, sections 5.3 and 5.4)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hfvlm.processing.assembly import IGNORE
from hfvlm.training.data import READERS, ContrastiveCollator, read_images


class AnswerCollator(ContrastiveCollator):
    """Collator of images with questions and answers to the inputs of a model that generates the answers.

    A row's answers are one text or a list, as VQA's ten; equal ones are one answer, whose weight in the loss is its
    share of the row's.

    Args:
        processor: with `answers`, as BLIP's.
        columns: {"image": ..., "text": ...}, the latter the questions.
        answer_column: of the answers.
        **options: see `ContrastiveCollator`.
    """

    def __init__(self, processor: Any, columns: Mapping[str, str], answer_column: str, **options: Any):
        super().__init__(processor, columns, all_captions=False, **options)
        self.answer_column = answer_column

    def read(self, row: Mapping[str, Any], random: np.random.Generator | None) -> dict[str, Any]:
        """Read a row: its image, its question and its answers.

        Raises:
            ValueError: it has no answer.
        """
        given = row[self.answer_column]
        answers = [given] if isinstance(given, str) else list(given)
        if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise ValueError(f"{self.answer_column}: needs a text or a list of texts, not {given!r:.100}.")
        return super().read(row, random) | {"answers": Counter(answers)}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows of `Rows` to images, questions, `labels` `(A, M)`, `answer_counts` `(B,)` and `answer_weights`
        `(A,)`."""
        inputs = super().__call__(rows)
        inputs.pop("row_ids"), inputs.pop("caption_counts")
        answers = [row["answers"] for row in rows]
        inputs["labels"] = self.processor.answers([answer for each in answers for answer in each])
        inputs["answer_counts"] = torch.tensor([len(each) for each in answers])
        inputs["answer_weights"] = torch.tensor([n / each.total() for each in answers for n in each.values()])
        return inputs


class SentenceCollator(ContrastiveCollator):
    """Collator of sentences about several images each, and whether they are true, to a classifier's inputs, as
    NLVR2's.

    Args:
        processor: takes a list of images for each text.
        columns: {"image": ..., "text": ...}, the former lists of images.
        label_column: true or false, 1 or 0, or "True" and "False".
        **options: see `ContrastiveCollator`.
    """

    readers = READERS | {"image": read_images}

    def __init__(self, processor: Any, columns: Mapping[str, str], label_column: str, **options: Any):
        super().__init__(processor, columns, all_captions=False, **options)
        self.label_column = label_column

    def read(self, row: Mapping[str, Any], random: np.random.Generator | None) -> dict[str, Any]:
        """Read a row: its images, its sentence and whether that is true.

        Raises:
            ValueError: the label is neither.
        """
        label = {"true": 1, "false": 0, "1": 1, "0": 0}.get(str(row[self.label_column]).lower())
        if label is None:
            raise ValueError(f"{self.label_column}: {row[self.label_column]!r:.100} is neither true nor false.")
        return super().read(row, random) | {"label": label, "training": random is not None}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows of `Rows` to `pixel_values` `(B, images, C, H, W)`, texts and `labels` `(B,)`; in evaluations,
        rows that replace unreadable ones have no label."""
        inputs = super().__call__(rows)
        inputs.pop("row_ids"), inputs.pop("caption_counts")
        known = [row["label"] if row["training"] or not row["replaced"] else IGNORE for row in rows]
        return inputs | {"labels": torch.tensor(known)}
