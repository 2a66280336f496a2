"""The evaluations of `hfvlm eval`: each takes a model's folder and data, and returns a Report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from hfvlm.evaluation.answering import accuracy_of
from hfvlm.evaluation.bootstrap import interval
from hfvlm.evaluation.captioning import bleu, cider_of_each, rouge_l_of_each
from hfvlm.evaluation.classification import accuracy, confusion, mean_per_class_accuracy
from hfvlm.evaluation.probing import best_strength, few_shot_curve, fit
from hfvlm.evaluation.report import Mistake, Report, Result, confusion_plot, recall_plot, shots_plot
from hfvlm.evaluation.retrieval import partner_ranks
from hfvlm.inference.captioner import Captioner
from hfvlm.inference.embedder import Embedder
from hfvlm.inference.zero_shot import ZeroShotClassifier
from hfvlm.media.rows import captions_of, columns_by_name, load_rows, path_of

MOST_MISTAKES = 24
KS = (1, 5, 10)
SHOTS = (1, 2, 4, 8, 16)


@dataclass
class Data:
    """What to evaluate on.

    Args:
        dataset: what `datasets` reads: a folder of pictures in folders of classes or with metadata.jsonl, tars,
            Parquet, a Hub id.
        split: the rows that are judged.
        train_split: the rows that probes learn from.
        columns: {"image": "photo", "label": "species"}; by default columns called "image", "label", "text" (or
            "caption", "captions"), "question" and "answers".
        limit: no more rows than these, drawn with the seed.
        seed: of everything that is drawn.
    """

    dataset: str
    split: str = "test"
    train_split: str = "train"
    columns: Mapping[str, str] | None = None
    limit: int | None = None
    seed: int = 0

    def rows(self, split: str | None = None) -> Any:
        rows = load_rows(self.dataset, split=split or self.split)
        if self.limit is not None and self.limit < len(rows):
            order = np.random.default_rng(self.seed).permutation(len(rows))[: self.limit]
            rows = rows.select(sorted(order.tolist()))
        return rows

    def column(self, rows: Any, name: str) -> Sequence[Any]:
        """The values of what is called `name` here.

        Raises:
            ValueError: there is no such column.
        """
        known = columns_by_name(rows.column_names) | {k: k for k in ("label", "question", "answers")}
        column = (known | dict(self.columns or {})).get(name)
        if column not in rows.column_names:
            raise ValueError(f"{self.dataset}: has no column for {name}; name one of {', '.join(rows.column_names)}.")
        return rows[column]


def zero_shot(
    folder: str, data: Data, *, templates: str = "single", labels: Sequence[str] | None = None, **options: Any
) -> Report:
    """Classes by their names.

    Args:
        folder: the model's.
        data: with pictures and labels.
        templates: see `ZeroShotClassifier`.
        labels: the classes' names; by default those of the label column, with spaces for underscores.
        **options: of `Embedder.from_pretrained`.
    """
    rows = data.rows()
    truth, names = labelled(data, rows, labels)
    classifier = ZeroShotClassifier.from_pretrained(folder, names, templates, **options)
    images = data.column(rows, "image")
    scores = classifier.scores(images, progress=True)
    hits = scores.argmax(axis=1) == truth
    results = [
        with_interval("accuracy", hits),
        Result("accuracy@5", accuracy(scores, truth, 5)),
        Result("mean-per-class accuracy", mean_per_class_accuracy(scores.argmax(axis=1), truth)),
    ]
    protocol = {"templates": templates, "classes": len(names), "split": data.split}
    report = Report("zero-shot", folder, data.dataset, len(rows), protocol, results)
    report.plots = {"confusion": confusion_plot(confusion(scores.argmax(axis=1), truth, len(names)), names)}
    report.mistakes = worst(images, scores, truth, names)
    return report


def retrieval(folder: str, data: Data, **options: Any) -> Report:
    """Captions by pictures and pictures by captions; all captions of a picture are its partners."""
    rows = data.rows()
    images, texts = data.column(rows, "image"), [captions_of(text) for text in data.column(rows, "text")]
    embedder = Embedder.from_pretrained(folder, **options)
    found = embedder.encode(image=images, text=[t for given in texts for t in given], progress=True, output="torch")
    owners = torch.arange(len(images)).repeat_interleave(torch.tensor([len(given) for given in texts]))
    score = getattr(embedder.model, "score", None)
    both = {
        "image to text": partner_ranks(found["image"], found["text"], torch.arange(len(images)), owners, score=score),
        "text to image": partner_ranks(found["text"], found["image"], owners, torch.arange(len(images)), score=score),
    }
    ranks = {name: found.numpy() for name, found in both.items()}
    results = [with_interval(f"{name} recall@{k}", rank < k) for name, rank in ranks.items() for k in KS]
    protocol = {"captions": len(owners), "split": data.split}
    report = Report("retrieval", folder, data.dataset, len(rows), protocol, results)
    report.plots = {"recall": recall_plot(ranks)}
    order = np.argsort(-ranks["image to text"], kind="stable")[:MOST_MISTAKES]
    report.mistakes = [
        Mistake(path_of(images[i]), f"{ranks['image to text'][i]} texts before: {texts[i][0]}")
        for i in order.tolist()
        if ranks["image to text"][i]
    ]
    return report


def linear_probe(folder: str, data: Data, **options: Any) -> Report:
    """Logistic regression on frozen features, with its strength chosen on a part of the training rows."""
    names, (features, truth), (train, train_truth), images = probed(folder, data, options)
    strength = best_strength(train, train_truth, seed=data.seed)
    scores = fit(train, train_truth, strength).decision_function(features)
    scores = np.stack([-scores, scores], axis=1) if scores.ndim == 1 else scores
    predictions = scores.argmax(axis=1)
    results = [
        with_interval("accuracy", predictions == truth),
        Result("mean-per-class accuracy", mean_per_class_accuracy(predictions, truth)),
    ]
    protocol = {"training rows": len(train), "C": f"{strength:.3g}", "C chosen on": "20 % of the training rows"}
    report = Report("linear-probe", folder, data.dataset, len(truth), protocol | {"split": data.split}, results)
    report.plots = {"confusion": confusion_plot(confusion(predictions, truth, len(names)), names)}
    report.mistakes = worst(images, scores, truth, names)
    return report


def few_shot(folder: str, data: Data, *, shots: Sequence[int] = SHOTS, **options: Any) -> Report:
    """The same with few rows of each class, three draws of them each."""
    names, test, train, _ = probed(folder, data, options)
    strength = best_strength(*train, seed=data.seed)
    fewest = int(np.bincount(train[1]).min())
    curve = few_shot_curve(train, test, [count for count in shots if count <= fewest], strength)
    results = [Result(f"accuracy, {count} shots", fmean(v), min(v), max(v)) for count, v in curve.items()]
    protocol = {
        "draws": 3,
        "C": f"{strength:.3g}",
        "intervals": "lowest and highest of the draws",
        "classes": len(names),
    }
    report = Report("few-shot", folder, data.dataset, len(test[1]), protocol | {"split": data.split}, results)
    report.plots = {"shots": shots_plot(curve, None)}
    return report


def caption(folder: str, data: Data, *, generate: Mapping[str, Any] | None = None, **options: Any) -> Report:
    """Captions beside those that people wrote.

    Args:
        folder: the model's.
        data: with pictures and captions.
        generate: options of `generate`.
        **options: of `Captioner.from_pretrained`.
    """
    rows = data.rows()
    images, texts = data.column(rows, "image"), [captions_of(text) for text in data.column(rows, "text")]
    generate = dict(generate or {"num_beams": 3, "max_new_tokens": 30})
    written = Captioner.from_pretrained(folder, **options)(images, **generate)
    each = np.array(cider_of_each(written, texts))
    results = [Result(f"BLEU-{n + 1}", score) for n, score in enumerate(bleu(written, texts))]
    results += [with_interval("ROUGE-L", rouge_l_of_each(written, texts)), with_interval("CIDEr-D", each)]
    report = Report("caption", folder, data.dataset, len(rows), generate | {"split": data.split}, results)
    order = np.argsort(each, kind="stable")[:MOST_MISTAKES].tolist()
    report.mistakes = [Mistake(path_of(images[i]), f"{written[i]} (not: {texts[i][0]})") for i in order]
    return report


def vqa(folder: str, data: Data, *, generate: Mapping[str, Any] | None = None, **options: Any) -> Report:
    """Answers beside those that people gave, by the VQA challenge's accuracy; arguments as `caption`."""
    rows = data.rows()
    images, questions = data.column(rows, "image"), data.column(rows, "question")
    answers = [captions_of(given) for given in data.column(rows, "answers")]
    generate = dict(generate or {"num_beams": 3, "max_new_tokens": 10})
    captioner = Captioner.from_pretrained(folder, **options)
    written = captioner(images, [captioner.processor.asked(question) for question in questions], **generate)
    each = np.array([accuracy_of(*pair) for pair in zip(written, answers, strict=True)])
    protocol = generate | {"split": data.split}
    report = Report("vqa", folder, data.dataset, len(rows), protocol, [with_interval("VQA accuracy", each)])
    order = np.argsort(each, kind="stable")[:MOST_MISTAKES].tolist()
    report.mistakes = [
        Mistake(path_of(images[i]), f"{questions[i]} {written[i]} (not: {answers[i][0]})")
        for i in order
        if each[i] < 1
    ]
    return report


TASKS: dict[str, Callable[..., Report]] = {
    "zero-shot": zero_shot,
    "retrieval": retrieval,
    "linear-probe": linear_probe,
    "few-shot": few_shot,
    "caption": caption,
    "vqa": vqa,
}


def with_interval(metric: str, values: Any) -> Result:
    """The mean of a value of each row."""
    each = np.asarray(values, np.float64)
    low, high = interval(lambda rows: float(each[rows].mean()), len(each))
    return Result(metric, float(each.mean()), low, high)


def labelled(data: Data, rows: Any, labels: Sequence[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """Each row's class, and the classes' names.

    Raises:
        ValueError: the labels have no names, or a row has a class without one.
    """
    values = data.column(rows, "label")
    feature = rows.features.get((data.columns or {}).get("label", "label"))
    names = list(labels or getattr(feature, "names", None) or sorted({str(value) for value in values}))
    if all(isinstance(value, int) for value in values):
        if not labels and not hasattr(feature, "names"):
            raise ValueError(f"{data.dataset}: its labels are numbers; give the classes' names with labels.")
        truth = np.array(values)
    else:
        place = {name: i for i, name in enumerate(names)}
        if unknown := sorted({str(value) for value in values} - set(place)):
            raise ValueError(f"{data.dataset}: label {unknown[0]!r} is not among the names that were given.")
        truth = np.array([place[str(value)] for value in values])
    return truth, names if labels else [name.replace("_", " ") for name in names]


def probed(
    folder: str, data: Data, options: Mapping[str, Any]
) -> tuple[list[str], tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], Sequence[Any]]:
    """The classes' names; features and classes of the rows that are judged, and of those to learn from; pictures."""
    embedder = Embedder.from_pretrained(folder, **options)
    embedder.check_one_vector("A probe")
    parts = []
    for split in (data.split, data.train_split):
        rows = data.rows(split)
        images = data.column(rows, "image")
        truth, names = labelled(data, rows)
        parts.append((embedder.encode(image=images, progress=True), truth, names, images))
    (features, truth, names, images), (train, train_truth, *_) = parts
    return names, (features, truth), (train, train_truth), images


def worst(images: Sequence[Any], scores: np.ndarray, truth: np.ndarray, names: list[str]) -> list[Mistake]:
    """The rows whose own class lies farthest below another one."""
    own = scores[np.arange(len(truth)), truth]
    order = np.argsort(own - scores.max(axis=1), kind="stable")[:MOST_MISTAKES].tolist()
    return [
        Mistake(path_of(images[i]), f"{names[scores[i].argmax()]} (not: {names[truth[i]]})")
        for i in order
        if scores[i].argmax() != truth[i]
    ]


def evaluate(task: str, folder: str | Path, data: Data, **options: Any) -> Report:
    """Run one of TASKS.

    Raises:
        ValueError: there is no such task, or the data lack a column.
    """
    if task not in TASKS:
        raise ValueError(f"No task is called {task!r}; there are {', '.join(TASKS)}.")
    return TASKS[task](str(folder), data, **options)
