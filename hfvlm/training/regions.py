"""Batches of texts with the regions that a detector found in images, for ViLBERT's tasks."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hfvlm.models.vilbert.processing_vilbert_tasks import ENTAILMENT, classified, grounded, paired, retrieved
from hfvlm.models.vilbert.regions import RegionFile, Regions, read_npy
from hfvlm.models.vilbert.tasks import TASKS, task_of

# Kinds of tasks that rows are examples of, with the columns that they need next to "image" and "text".
KINDS = {"answer": "labels", "gqa": "labels", "entailment": "labels", "pair": "labels", "grounding": "box"}
KINDS |= {"choice": "label"}


class RegionFolder(Mapping[str, Regions]):
    """A folder of the authors' npy files: regions by the image's name, each read when it is asked for."""

    def __init__(self, path: str | Path):
        self.files = {file.stem: file for file in sorted(Path(path).glob("*.npy"))}
        self.path = path

    def __getitem__(self, image: Any) -> Regions:
        name = Path(str(image)).stem if str(image) not in self.files else str(image)
        if name not in self.files:
            raise KeyError(f"{self.path} has no regions of {image!r} ({name}.npy); it has {len(self)} others.")
        return read_npy(self.files[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def open_regions(path: str | Path) -> Mapping[str, Regions]:
    """Open a folder of npy files, or an lmdb file.

    Raises:
        ValueError: there is no such folder, or neither in it.
        ImportError: lmdb is not installed (`pip install 'hfvlm[regions]'`).
    """
    folder = Path(path)
    if folder.is_dir() and (folder / "data.mdb").exists():
        return RegionFile(folder)
    if folder.is_dir() and (found := RegionFolder(folder)):
        return found
    raise ValueError(f"regions: {path} is neither a folder of npy files nor an lmdb file (data.mdb) of the authors'.")


class RegionCollator:
    """Collator of rows with a text and the name of an image to the inputs of one of ViLBERT's tasks, and `labels`.

    Rows of questions and of entailment have `labels`, the number of the right answer or a list of them, and may have
    `scores`, the share of annotators who gave each; entailment's may be names. Those of two images (NLVR2) have a list
    of names as `image`. Rows of referring expressions have a `box`: left, top, right, bottom, in pixels. Rows of
    retrieval have lists of texts and of images that are pairs, and the number of the right one as `label`.

    Args:
        processor: of the model.
        task: name of one of its tasks.
        regions: the folder of npy files, or the lmdb file, in which the images' regions are.
        columns: {"text": "question"}: the columns; by default they have the names above.
        classes: the model's number of answers, of the tasks that have some.

    Raises:
        ValueError: there is no such task, or its rows are not of these kinds, or no such folder.
    """

    def __init__(
        self,
        processor: Any,
        task: str,
        regions: str | Path,
        columns: Mapping[str, str] | None = None,
        classes: Mapping[str, int] | None = None,
    ):
        self.processor, self.task, self.path = processor, task_of(task), regions
        if self.task.kind not in KINDS:
            known = [name for name, each in TASKS.items() if each.kind in KINDS]
            raise ValueError(f"Rows are no examples of {task}; they are of {', '.join(known)}.")
        self.columns, self.classes = dict(columns or {}), dict(classes or {})
        self.opened: dict[int, Mapping[str, Regions]] = {os.getpid(): open_regions(regions)}

    @property
    def regions(self) -> Mapping[str, Regions]:
        """The regions by the images' names: an open lmdb file is of the process that opened it."""
        if os.getpid() not in self.opened:
            self.opened = {os.getpid(): open_regions(self.path)}
        return self.opened[os.getpid()]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"opened": {}}

    def read(self, row: Mapping[str, Any], random: np.random.Generator | None) -> dict[str, Any]:
        """Read a row -> the model's inputs of as many rows as the task takes; nothing is random.

        Raises:
            KeyError: the data set has no such column, or there are no regions of the image.
            ValueError: the row does not fit the task.
        """
        kind, values = self.task.kind, {}
        for name in ("image", "text", KINDS[kind]):
            column = self.columns.get(name, name)
            if row.get(column) is None:
                raise KeyError(f"The data set has no column {column!r} ({name}); it has {', '.join(row)}.")
            values[name] = row[column]
        names, text, wanted = values["image"], values["text"], values[KINDS[kind]]
        found: Any = [self.regions[name] for name in (names if isinstance(names, list | tuple) else [names])]
        if kind == "grounding":
            return grounded(self.processor, self.task, text, found[0], wanted)
        if kind == "choice":
            return retrieved(self.processor, self.task, text, found, int(wanted))
        answers = self.answers(row, wanted)
        if kind == "pair":
            if len(found) != 2:
                raise ValueError(f"A row of {len(found)} images; the task's are about two.")
            return paired(self.processor, self.task, text, found, answers)
        return classified(self.processor, self.task, text, found[0], answers, self.classes.get(kind))

    def answers(self, row: Mapping[str, Any], labels: Any) -> dict[int, float]:
        """Return the share of each answer of a row by its number."""
        several = list(labels) if isinstance(labels, list | tuple) else [labels]
        if unknown := [each for each in several if isinstance(each, str) and each not in ENTAILMENT]:
            raise ValueError(f"labels {unknown} are no numbers, nor {', '.join(ENTAILMENT)}.")
        scores = row.get(self.columns.get("scores", "scores")) or [1.0] * len(several)
        if len(scores) != len(several):
            raise ValueError(f"{len(several)} labels and {len(scores)} scores: each label has one.")
        numbers = [ENTAILMENT[each] if isinstance(each, str) else int(each) for each in several]
        return dict(zip(numbers, map(float, scores), strict=True))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows of `Rows`, or of a data set, to the model's inputs, `labels` and, of `Rows`, "replaced"."""
        read = rows if "replaced" in rows[0] else [self.read(row, None) for row in rows]
        names = [name for name, value in read[0].items() if isinstance(value, torch.Tensor)]
        inputs: dict[str, Any] = self.processor.collate([{name: row[name] for name in names} for row in read])
        return inputs | ({"replaced": torch.tensor([row["replaced"] for row in rows])} if read is rows else {})
