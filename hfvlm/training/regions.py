"""Batches of texts with the regions that a detector found in images, for ViLBERT's tasks."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from hfvlm.models.vilbert.processing_vilbert_tasks import (
    CANDIDATES,
    ENTAILMENT,
    GUESSWHAT,
    Example,
    classified,
    conversed,
    dialog_options,
    grounded,
    guesswhat_text,
    paired,
    pointed,
    reasoned,
    retrieved,
)
from hfvlm.models.vilbert.regions import RegionFile, Regions, read_npy
from hfvlm.models.vilbert.tasks import KINDS, TASKS, task_of
from hfvlm.training.row_trainer import LabelTrainer, without_bookkeeping

# Names that labels may have, of the tasks whose classes have some.
NAMES: dict[str, Mapping[str, int]] = {"visual_entailment": ENTAILMENT, "guesswhat": GUESSWHAT}
# A word of VCR that stands for annotated regions.
NUMBERS = re.compile(r"\[\d+(, ?\d+)*\]")
# Columns that rows of a task need next to "image" and "text", by the task or else by its kind.
COLUMNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("answer", "gqa", "entailment", "pair"), ("labels",)),
    "grounding": ("box",),
    "pointing": ("box", "candidates"),
    "choice": ("label",),
    "visual_dialog": ("turns", "options", "labels"),
    **dict.fromkeys(("vcr_answer", "vcr_rationale"), ("options", "names", "label")),
}


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

    Next to `image` and `text`, rows have

    - of questions, entailment and GuessWhat's answers `labels`, the number of the right answer or a list of them, and
      maybe `scores`, the share of annotators who gave each; entailment's and GuessWhat's may be names. Those of two
      images (NLVR2) have a list of names as `image`;
    - of referring expressions a `box`: left, top, right, bottom, in pixels;
    - of Visual7W and GuessWhat's pointing the `box` of the answer, and `candidates`, numbers of annotated regions.
      GuessWhat's text may be a list of turns, a question and its answer each;
    - of retrieval lists of texts and of images that are pairs, and the number of the right one as `label`;
    - of Visual Dialog the image's caption as text, `turns`, a question and its answer each, of each the list of its
      `options`, and the right ones' numbers as `labels`. Training draws three wrong ones, evaluation takes all;
    - of VCR `options`, `names` of the annotated regions, and the right option's number as `label`. Its texts are lists
      of words and of lists of such regions' numbers, or words as "[0, 2]" for these, since tables hold no lists of
      both; that of a rationale is the question, "[SEP]" and the answer.

    Args:
        processor: of the model.
        task: name of one of its tasks.
        regions: the folder of npy files, or the lmdb file, in which the images' regions are.
        columns: {"text": "question"}: the columns; by default they have the names above.
        classes: the model's number of answers, of the tasks that have some.
        annotated: likewise a folder or a file, of regions that people drew: those that pointing and VCR are about.
            Referring expressions have them among their regions in training.

    Raises:
        ValueError: there is no such task, no such folder, or none of annotated regions for a task that needs them.
    """

    def __init__(
        self,
        processor: Any,
        task: str,
        regions: str | Path,
        columns: Mapping[str, str] | None = None,
        classes: Mapping[str, int] | None = None,
        annotated: str | Path | None = None,
    ):
        self.processor, self.task = processor, task_of(task)
        self.name = next(name for name, known in TASKS.items() if known is self.task)
        self.paths = {"regions": regions} | ({} if annotated is None else {"annotated": annotated})
        if annotated is None and (self.task.kind == "pointing" or self.name in ("vcr_answer", "vcr_rationale")):
            raise ValueError(f"annotated: {task} is about regions that people drew, a folder or an lmdb file of them.")
        self.columns, self.classes = dict(columns or {}), dict(classes or {})
        self.opened: dict[int, dict[str, Mapping[str, Regions]]] = {}
        self.stores()

    def stores(self) -> dict[str, Mapping[str, Regions]]:
        """Return the regions by the images' names: an open lmdb file is of the process that opened it."""
        if os.getpid() not in self.opened:
            self.opened = {os.getpid(): {name: open_regions(path) for name, path in self.paths.items()}}
        return self.opened[os.getpid()]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"opened": {}}

    def read(self, row: Mapping[str, Any], random: np.random.Generator | None) -> dict[str, Any]:
        """Read a row -> the model's inputs of as many rows as the task takes.

        Raises:
            KeyError: the data set has no such column, or there are no regions of the image.
            ValueError: the row does not fit the task.
        """
        kind, values = self.task.kind, {}
        for name in ("image", "text", *COLUMNS.get(self.name, COLUMNS[kind])):
            column = self.columns.get(name, name)
            if row.get(column) is None:
                raise KeyError(f"The data set has no column {column!r} ({name}); it has {', '.join(row)}.")
            values[name] = row[column]
        values["scores"] = row.get(self.columns.get("scores", "scores"))
        names = values["image"]
        images: Any = [self.stores()["regions"][name] for name in (names if _is_list(names) else [names])]
        several = kind == "pair" or (kind == "choice" and self.name.startswith("retrieval"))
        if _is_list(names) != several:
            raise ValueError(f"image: a row of {self.name} has {'a list of images' if several else 'one image'}.")
        return self.maker()(values, images if several else images[0], random)

    def maker(self) -> Callable[[dict[str, Any], Any, np.random.Generator | None], Example]:
        """Return what makes an example of a row's values and its regions."""
        own = {
            "visual_dialog": self.conversed,
            "vcr_answer": self.reasoned,
            "vcr_rationale": self.reasoned,
            "grounding": self.grounded,
            "pointing": self.pointed,
            "choice": self.retrieved,
            "pair": self.paired,
        }
        return own.get(self.name, own.get(self.task.kind, self.classified))

    def drawn(self, values: Mapping[str, Any]) -> Regions:
        """Return the annotated regions of a row's image."""
        return self.stores()["annotated"][values["image"]]

    def classified(self, values: dict[str, Any], image: Regions, _: Any) -> Example:
        classes = self.classes.get(self.task.kind)
        return classified(self.processor, self.task, values["text"], image, self.answers(values), classes)

    def paired(self, values: dict[str, Any], images: Any, _: Any) -> Example:
        if len(images) != 2:
            raise ValueError(f"A row of {len(images)} images; the task's are about two.")
        return paired(self.processor, self.task, values["text"], images, self.answers(values))

    def grounded(self, values: dict[str, Any], image: Regions, random: np.random.Generator | None) -> Example:
        truth = self.drawn(values) if random is not None and "annotated" in self.paths else None
        return grounded(self.processor, self.task, values["text"], image, values["box"], truth)

    def pointed(self, values: dict[str, Any], image: Regions, _: Any) -> Example:
        text = values["text"]
        text = text if isinstance(text, str) else guesswhat_text([(turn[0], turn[1]) for turn in text])
        most = CANDIDATES if self.name == "guesswhat_pointing" else None
        chosen = values["box"], [int(each) for each in values["candidates"]]
        return pointed(self.processor, self.task, text, image, self.drawn(values), *chosen, most)

    def retrieved(self, values: dict[str, Any], images: Any, _: Any) -> Example:
        right = checked_choice(values["label"], values["text"])
        if len(images) != len(values["text"]):
            raise ValueError(f"{len(values['text'])} texts and {len(images)} images: they are pairs.")
        return retrieved(self.processor, self.task, values["text"], images, right)

    def conversed(self, values: dict[str, Any], image: Regions, random: np.random.Generator | None) -> Example:
        turns, options, labels = values["turns"], values["options"], values["labels"]
        if not len(turns) == len(options) == len(labels):
            raise ValueError(f"{len(turns)} turns, {len(options)} lists of options and {len(labels)} labels.")
        shown = []
        for texts, label in zip(options, labels, strict=True):
            right = checked_choice(label, texts)
            if random is None:
                order = [right, *(i for i in range(len(texts)) if i != right)]
            else:
                order = dialog_options(right, len(texts), random)
            shown.append([texts[i] for i in order])
        if len({len(texts) for texts in shown}) != 1:
            raise ValueError("options: all questions of a dialogue need as many.")
        return conversed(self.processor, self.task, values["text"], [(q, a) for q, a in turns], shown, image)

    def reasoned(self, values: dict[str, Any], image: Regions, _: Any) -> Example:
        right, truth, names = checked_choice(values["label"], values["options"]), self.drawn(values), values["names"]
        if len(names) != len(truth):
            raise ValueError(f"names: {len(names)} of {len(truth)} annotated regions.")
        texts = words_of(values["text"]), [words_of(option) for option in values["options"]], names
        return reasoned(self.processor, self.task, *texts, image, truth, right)

    def answers(self, values: Mapping[str, Any]) -> dict[int, float]:
        """Return the share of each answer of a row by its number."""
        labels, known = values["labels"], NAMES.get(self.name, {})
        several = list(labels) if _is_list(labels) else [labels]
        if unknown := [each for each in several if isinstance(each, str) and each not in known]:
            others = f", nor {', '.join(known)}" if known else ""
            raise ValueError(f"labels {unknown} are no numbers{others}.")
        scores = values["scores"] or [1.0] * len(several)
        if len(scores) != len(several):
            raise ValueError(f"{len(several)} labels and {len(scores)} scores: each label has one.")
        numbers = [known[each] if isinstance(each, str) else int(each) for each in several]
        return dict(zip(numbers, map(float, scores), strict=True))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows of `Rows`, or of a data set, to the model's inputs, `labels` and, of `Rows`, "replaced"."""
        read = rows if "replaced" in rows[0] else [self.read(row, None) for row in rows]
        names = [name for name, value in read[0].items() if isinstance(value, torch.Tensor)]
        for what, counts in self.counts(read).items():
            if len(counts) > 1:
                raise ValueError(f"{what}: the rows of a batch of {self.name} need as many, not {sorted(counts)}.")
        inputs: dict[str, Any] = self.processor.collate([{name: row[name] for name in names} for row in read])
        return inputs | ({"replaced": torch.tensor([row["replaced"] for row in rows])} if read is rows else {})

    def counts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, set[int]]:
        """Return how many options, or candidates, rows have, of tasks that choose among some."""
        if self.task.kind == "choice":
            return {"options": {len(row["input_ids"]) // len(row["labels"]) for row in rows}}
        return {"candidates": {row["candidates"].shape[1] for row in rows}} if self.task.kind == "pointing" else {}


class RegionTrainer(LabelTrainer):
    """Trainer of one of ViLBERT's tasks, whose evaluations have its score, the mean over questions."""

    def __init__(self, task: str, *args: Any, **options: Any):
        super().__init__(*args, compute_metrics=mean_score, **options)
        self.task, self.training_inputs = task_of(task), {"task": task}

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: FBT001 (transformers' signature)
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return a batch's loss and, as logits and as labels, the score of each question, `(questions,)`."""
        given: Any = self._prepare_inputs(without_bookkeeping(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**given, **self.training_inputs)
        if prediction_loss_only:
            return output.loss.detach(), None, None
        scores = KINDS[self.task.kind].score(output.logits, given["labels"])
        return output.loss.detach(), scores, scores


def mean_score(prediction: EvalPrediction) -> dict[str, float]:
    """Average the scores of questions."""
    return {"score": float(np.mean(prediction.predictions))}


def words_of(text: Sequence[Any]) -> list[Any]:
    """Return words, with lists of numbers for those that stand for regions."""
    return [json.loads(word) if isinstance(word, str) and NUMBERS.fullmatch(word) else word for word in text]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def checked_choice(label: Any, options: Sequence[Any]) -> int:
    """Return the number of the right one of some options.

    Raises:
        ValueError: it is none of them.
    """
    if not 0 <= int(label) < len(options):
        raise ValueError(f"label {label} is none of the {len(options)} options.")
    return int(label)
