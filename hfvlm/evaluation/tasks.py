"""The evaluations of `hfvlm eval`: each takes a model's folder and data, and returns a Report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvlm.checks.ranges import check_generation, check_integer
from hfvlm.evaluation.answering import accuracy_of
from hfvlm.evaluation.bootstrap import interval
from hfvlm.evaluation.captioning import bleu, cider_of_each, rouge_l_of_each
from hfvlm.evaluation.classification import confusion, mean_per_class_accuracy
from hfvlm.evaluation.probing import best_strength, few_shot_curve, fit
from hfvlm.evaluation.report import Mistake, Report, Result, confusion_plot, recall_plot, shots_plot
from hfvlm.evaluation.retrieval import partner_ranks, ranks_of_best
from hfvlm.inference.captioner import Captioner
from hfvlm.inference.embedder import Embedder
from hfvlm.inference.zero_shot import ZeroShotClassifier
from hfvlm.media.rows import COLUMNS, UNREADABLE, captions_of, columns_by_name, load_rows, path_of

MOST_MISTAKES = 24
KS = (1, 5, 10)
SHOTS = (1, 2, 4, 8, 16)
BATCH = 16


@dataclass
class Data:
    """What to evaluate on.

    Args:
        dataset: what `hfvlm.media.rows.load_rows` reads: a folder of media in folders of classes or with
            metadata.jsonl, tars, Parquet, a Hub id.
        split: the rows that are judged.
        train_split: the rows that probes learn from.
        columns: {"image": "photo", "label": "species"}; by default columns called as modalities are, "label", "text"
            (or "caption", "captions"), "question" and "answers".
        limit: no more rows than these, drawn with the seed.
        seed: of everything that is drawn.

    Raises:
        ValueError: the limit or the seed is out of its range.
    """

    dataset: str
    split: str = "test"
    train_split: str = "train"
    columns: Mapping[str, str] | None = None
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_integer("limit", self.limit)
        check_integer("seed", self.seed, 0)

    def rows(self, split: str | None = None) -> Any:
        rows = load_rows(self.dataset, split=split or self.split)
        if self.limit is not None and self.limit < len(rows):
            order = np.random.default_rng(self.seed).permutation(len(rows))[: self.limit]
            rows = rows.select(sorted(order.tolist()))
        return rows

    def column_name(self, rows: Any, name: str) -> str | None:
        """The column of what is called `name` here, if there is one."""
        known = columns_by_name(rows.column_names) | {k: k for k in ("label", "question", "answers")}
        column = (known | dict(self.columns or {})).get(name)
        return column if column in rows.column_names else None

    def column(self, rows: Any, name: str) -> Sequence[Any]:
        """The values of what is called `name` here.

        Raises:
            ValueError: there is no such column.
        """
        column = self.column_name(rows, name)
        if column is None:
            raise ValueError(f"{self.dataset}: has no column for {name}; name one of {', '.join(rows.column_names)}.")
        return rows[column]

    def about(self, rows: Any, names: Sequence[str]) -> dict[str, Any]:
        """What a report says of the rows."""
        columns = {name: self.column_name(rows, name) for name in names}
        return {"columns": columns, "split": self.split, "limit": self.limit, "seed": self.seed, "of": len(rows)}


@dataclass
class Known:
    """The sources of one column that can be read.

    Args:
        vectors: `(N, D)` of them.
        rows: their row numbers, `(N,)`; a row may have several captions.
        errors: by row number, what is wrong with the others.
    """

    vectors: Tensor
    rows: Tensor
    errors: dict[int, str] = field(default_factory=dict)

    def among(self, rows: Tensor) -> "Known":
        """Those of some rows alone."""
        kept = torch.isin(self.rows, rows)
        return Known(self.vectors[kept], self.rows[kept])


def zero_shot(
    folder: str,
    data: Data,
    *,
    templates: str = "single",
    labels: Sequence[str] | None = None,
    modality: str = "image",
    **options: Any,
) -> Report:
    """Classes by their names.

    Args:
        folder: the model's.
        data: with media and labels.
        templates: see `ZeroShotClassifier`.
        labels: the classes' names; by default those of the label column, with spaces for underscores.
        modality: of the media: image, video, audio, depth, thermal or imu.
        **options: of `Embedder.from_pretrained`.
    """
    rows = data.rows()
    truth, names = labelled(data, rows, labels)
    classifier = ZeroShotClassifier.from_pretrained(folder, names, templates, **options)
    media = data.column(rows, modality)
    known, truth = labelled_vectors(classifier.embedder, modality, media, truth)
    scores = known.vectors.numpy() @ classifier.weights.T
    numbers, ranks = known.rows.tolist(), ranks_of(scores, truth)
    report = Report("zero-shot", folder, data.dataset, len(truth), {}, [], errors=known.errors)
    report.protocol = {"templates": templates, "classes": len(names), "split": data.split}
    report.protocol |= {} if modality == "image" else {"modality": modality}
    report.about = about_model(classifier.embedder.model) | data.about(rows, [modality, "label"])
    add_each(report, "accuracy", numbers, ranks < 1)
    report.results.append(Result("accuracy@5", float((ranks < 5).mean())))
    report.results.append(Result("mean-per-class accuracy", mean_per_class_accuracy(scores.argmax(axis=1), truth)))
    report.plots = {"confusion": confusion_plot(confusion(scores.argmax(axis=1), truth, len(names)), names)}
    report.mistakes = worst([media[i] for i in numbers], scores, truth, names)
    return report


def ranks_of(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """`(N, classes)` and the right ones -> how many others score as high, `(N,)`."""
    right = torch.from_numpy(np.eye(scores.shape[1], dtype=bool)[truth])
    return ranks_of_best(torch.from_numpy(scores), right).numpy()


def retrieval(folder: str, data: Data, *, between: Sequence[str] | str | None = None, **options: Any) -> Report:
    """One modality by another, in both directions; all captions of a row are its positives.

    Args:
        folder: the model's.
        data: with two modalities or more.
        between: ["audio", "text"]; "any" for all pairs that the data and the model have; by default images and texts,
            or, of other data, all pairs.
        **options: of `Embedder.from_pretrained`.

    Raises:
        ValueError: the data or the model lack a modality, or no row can be read in all of them.
    """
    rows = data.rows()
    embedder = Embedder.from_pretrained(folder, **options)
    modalities = compared(data, rows, embedder, between)
    found = {m: embedded(embedder, m, data.column(rows, m)) for m in modalities}
    errors = {row: f"{m}: {error}" for m, known in found.items() for row, error in known.errors.items()}
    good = torch.tensor([row for row in range(len(rows)) if row not in errors], dtype=torch.long)
    if not len(good):
        raise ValueError(f"{data.dataset}: no row can be read; row 0: {errors.get(0, 'there are none')}.")
    found = {m: known.among(good) for m, known in found.items()}
    report = Report("retrieval", folder, data.dataset, len(good), {}, [], errors=dict(sorted(errors.items())))
    captions = {"captions": len(found["text"].rows)} if "text" in found else {}
    report.protocol = captions | {"split": data.split}
    report.about = about_model(embedder.model) | data.about(rows, modalities)
    ranks: dict[str, np.ndarray] = {}
    score = getattr(embedder.model, "score", None)
    for a, b in (pair for both in combinations(modalities, 2) for pair in (both, both[::-1])):
        queries, gallery = found[a], found[b]
        name = f"{a} to {b}"
        found_ranks = partner_ranks(queries.vectors, gallery.vectors, queries.rows, gallery.rows, score=score)
        ranks[name] = found_ranks.numpy()
        numbers = queries.rows.tolist()
        for k in KS:
            add_each(report, f"{name} recall@{k}", numbers, ranks[name] < k)
    report.plots = {"recall": recall_plot(ranks)}
    report.mistakes = missed(data, rows, modalities, next(iter(ranks.items())), found[modalities[0]].rows.tolist())
    return report


def compared(data: Data, rows: Any, embedder: Embedder, between: Sequence[str] | str | None) -> list[str]:
    """The modalities that are searched by one another.

    Raises:
        ValueError: there are fewer than two.
    """
    there = [m for m in COLUMNS if m in embedder.modalities and data.column_name(rows, m) is not None]
    if between is None:
        chosen = ["image", "text"] if {"image", "text"} <= set(there) else there
    else:
        chosen = there if between == "any" else [*([between] if isinstance(between, str) else between)]
        embedder.check(chosen)
        for modality in chosen:
            data.column(rows, modality)
    if len(set(chosen)) < 2:
        wanted = " and ".join(m for m in ("image", "text") if m not in there) or "a second modality"
        raise ValueError(
            f"{data.dataset}: has no column for {wanted}; name one of {', '.join(rows.column_names)}. The model "
            f"embeds {', '.join(embedder.modalities)}."
        )
    return list(dict.fromkeys(chosen))


def embedded(embedder: Embedder, modality: str, values: Sequence[Any]) -> Known:
    """The vectors of a column's values, of texts one for each caption."""
    if modality != "text":
        vectors, kept, errors = embedder.encode_known(modality, values, progress=True)
        return Known(vectors, torch.tensor(kept, dtype=torch.long), errors)
    captions, owners, wrong = [], [], {}
    for row, value in enumerate(values):
        try:
            own = captions_of(value)
        except ValueError as error:
            wrong[row] = str(error)
            continue
        captions += own
        owners += [row] * len(own)
    vectors, kept, errors = embedder.encode_known("text", captions, progress=True)
    wrong |= {owners[i]: error for i, error in errors.items()}
    return Known(vectors, torch.tensor([owners[i] for i in kept], dtype=torch.long), dict(sorted(wrong.items())))


def missed(
    data: Data, rows: Any, modalities: Sequence[str], ranks: tuple[str, np.ndarray], numbers: Sequence[int]
) -> list[Mistake]:
    """The rows of the first direction whose positives come last."""
    (first, second), (_, values) = modalities[:2], ranks
    sources, others = data.column(rows, first), data.column(rows, second)
    mistakes = []
    for i in np.argsort(-values, kind="stable")[:MOST_MISTAKES].tolist():
        if values[i]:
            other = others[numbers[i]]
            what = captions_of(other)[0] if second == "text" else path_of(other) or f"row {numbers[i]}"
            mistakes.append(Mistake(path_of(sources[numbers[i]]), f"{values[i]} {second}s before: {what}"))
    return mistakes


def linear_probe(folder: str, data: Data, *, modality: str = "image", **options: Any) -> Report:
    """Logistic regression on frozen features, with its strength chosen on a part of the training rows."""
    names, test, train, report = probed("linear-probe", folder, data, modality, options)
    strength = best_strength(*train, seed=data.seed)
    scores = fit(*train, strength).decision_function(test[0])
    scores = np.stack([-scores, scores], axis=1) if scores.ndim == 1 else scores
    predictions, truth, numbers = scores.argmax(axis=1), test[1], test[2]
    add_each(report, "accuracy", numbers, predictions == truth)
    report.results.append(Result("mean-per-class accuracy", mean_per_class_accuracy(predictions, truth)))
    report.protocol = {"training rows": len(train[1]), "C": f"{strength:.3g}"}
    report.protocol |= {"C chosen on": "20 % of the training rows", "split": data.split}
    report.plots = {"confusion": confusion_plot(confusion(predictions, truth, len(names)), names)}
    report.mistakes = worst(test[3], scores, truth, names)
    return report


def few_shot(
    folder: str, data: Data, *, shots: Sequence[int] = SHOTS, modality: str = "image", **options: Any
) -> Report:
    """The same with few rows of each class, three draws of them each."""
    shots = [check_integer("shots", count) for count in shots]
    names, test, train, report = probed("few-shot", folder, data, modality, options)
    strength = best_strength(*train, seed=data.seed)
    fewest = int(np.bincount(train[1]).min())
    curve = few_shot_curve(train, test[:2], [count for count in shots if count <= fewest], strength)
    report.results = [Result(f"accuracy, {count} shots", fmean(v), min(v), max(v)) for count, v in curve.items()]
    report.protocol = {
        "draws": 3,
        "C": f"{strength:.3g}",
        "intervals": "lowest and highest of the draws",
        "classes": len(names),
        "split": data.split,
    }
    report.plots = {"shots": shots_plot(curve, None)}
    return report


def caption(folder: str, data: Data, *, generate: Mapping[str, Any] | None = None, **options: Any) -> Report:
    """Captions next to those that people wrote.

    Args:
        folder: the model's.
        data: with images and captions.
        generate: options of `generate`.
        **options: of `Captioner.from_pretrained`.
    """
    rows = data.rows()
    references, errors = texts_of(data.column(rows, "text"))
    generate = dict(generate or {"num_beams": 3, "max_new_tokens": 30})
    captioner = Captioner.from_pretrained(folder, **options)
    images = data.column(rows, "image")
    written, errors = written_about(captioner, images, dict.fromkeys(references), errors, generate)
    numbers, texts = list(written), [references[row] for row in written]
    captions = list(written.values())
    each = np.array(cider_of_each(captions, texts))
    report = Report("caption", folder, data.dataset, len(numbers), generate | {"split": data.split}, [], errors=errors)
    report.about = about_model(captioner.model) | data.about(rows, ["image", "text"])
    report.results = [Result(f"BLEU-{n + 1}", score) for n, score in enumerate(bleu(captions, texts))]
    add_each(report, "ROUGE-L", numbers, np.array(rouge_l_of_each(captions, texts)))
    add_each(report, "CIDEr-D", numbers, each)
    order = np.argsort(each, kind="stable")[:MOST_MISTAKES].tolist()
    report.mistakes = [Mistake(path_of(images[numbers[i]]), f"{captions[i]} (not: {texts[i][0]})") for i in order]
    return report


def vqa(folder: str, data: Data, *, generate: Mapping[str, Any] | None = None, **options: Any) -> Report:
    """Answers next to those that people gave, by the VQA challenge's accuracy; arguments as `caption`."""
    rows = data.rows()
    images, questions = data.column(rows, "image"), data.column(rows, "question")
    references, errors = texts_of(data.column(rows, "answers"))
    generate = dict(generate or {"num_beams": 3, "max_new_tokens": 10})
    captioner = Captioner.from_pretrained(folder, **options)
    prompts: dict[int, Any] = {}
    for row in references:
        if isinstance(questions[row], str):
            prompts[row] = captioner.processor.asked(questions[row])
        else:
            errors[row] = f"question: a text is needed, not {questions[row]!r}."
    written, errors = written_about(captioner, images, prompts, errors, generate)
    numbers = list(written)
    each = np.array([accuracy_of(answer, references[row]) for row, answer in written.items()])
    report = Report("vqa", folder, data.dataset, len(numbers), generate | {"split": data.split}, [], errors=errors)
    report.about = about_model(captioner.model) | data.about(rows, ["image", "question", "answers"])
    add_each(report, "VQA accuracy", numbers, each)
    report.mistakes = [
        Mistake(path_of(images[row]), f"{questions[row]} {written[row]} (not: {references[row][0]})")
        for row in (numbers[i] for i in np.argsort(each, kind="stable")[:MOST_MISTAKES].tolist() if each[i] < 1)
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


def add_each(report: Report, metric: str, numbers: Sequence[int], values: np.ndarray) -> None:
    """A metric with a value for each row: its mean with the interval around it, and the values."""
    each = np.asarray(values, np.float64)
    low, high = interval(lambda rows: float(each[rows].mean()), len(each))
    report.results.append(Result(metric, float(each.mean()), low, high))
    sums: dict[int, list[float]] = {}
    for row, value in zip(numbers, each.tolist(), strict=True):
        sums.setdefault(row, []).append(value)
    report.each[metric] = {row: round(fmean(own), 6) for row, own in sums.items()}


def about_model(model: Any) -> dict[str, Any]:
    """What a report says of the model."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {"class": type(model).__name__, "dtype": dtype, "device": model.device.type}


def texts_of(values: Sequence[Any]) -> tuple[dict[int, list[str]], dict[int, str]]:
    """By row number the texts of a column, and what is wrong with the rows without any."""
    found, errors = {}, {}
    for row, value in enumerate(values):
        try:
            found[row] = captions_of(value)
        except ValueError as error:
            errors[row] = str(error)
    return found, errors


def written_about(
    captioner: Captioner,
    images: Sequence[Any],
    prompts: Mapping[int, str | None],
    errors: Mapping[int, str],
    generate: Mapping[str, Any],
) -> tuple[dict[int, str], dict[int, str]]:
    """By row number what is generated about images, and what is wrong with the rows that cannot be read.

    Raises:
        ValueError: no row can be read, or an option of `generate` is out of its range.
    """
    check_generation(generate)
    rows, found, wrong = list(prompts), dict[int, str](), dict(errors)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        try:
            texts = about_each(captioner, [images[row] for row in batch], [prompts[row] for row in batch], generate)
            found |= dict(zip(batch, texts, strict=True))
        except UNREADABLE:
            for row in batch:
                try:
                    (found[row],) = about_each(captioner, [images[row]], [prompts[row]], generate)
                except UNREADABLE as error:
                    wrong[row] = str(error)
    if not found:
        raise ValueError(f"No row can be read; the first: {next(iter(wrong.values()), 'there are none')}")
    return found, dict(sorted(wrong.items()))


def about_each(
    captioner: Captioner, images: list[Any], prompts: Sequence[str | None], generate: Mapping[str, Any]
) -> list[str]:
    texts = [prompt for prompt in prompts if prompt is not None]
    return captioner(images, texts or None, batch_size=BATCH, **generate)


def labelled(data: Data, rows: Any, labels: Sequence[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """Each row's class, -1 for rows without one, and the classes' names.

    Raises:
        ValueError: the labels have no names, or a row has a class without one.
    """
    values = data.column(rows, "label")
    feature = rows.features.get(data.column_name(rows, "label"))
    given = [value for value in values if value is not None]
    names = list(labels or getattr(feature, "names", None) or sorted({str(value) for value in given}))
    if all(isinstance(value, int) for value in given):
        if not labels and not hasattr(feature, "names"):
            raise ValueError(f"{data.dataset}: its labels are numbers; give the classes' names with labels.")
        if wrong := [value for value in given if value >= len(names)]:
            raise ValueError(f"{data.dataset}: label {wrong[0]} is beyond the {len(names)} names that were given.")
        truth = np.array([-1 if value is None else value for value in values])
    else:
        place = {name: i for i, name in enumerate(names)}
        if unknown := sorted({str(value) for value in given} - set(place)):
            raise ValueError(f"{data.dataset}: label {unknown[0]!r} is not among the names that were given.")
        truth = np.array([-1 if value is None else place[str(value)] for value in values])
    return truth, names if labels else [name.replace("_", " ") for name in names]


def labelled_vectors(
    embedder: Embedder, modality: str, media: Sequence[Any], truth: np.ndarray
) -> tuple[Known, np.ndarray]:
    """The vectors and classes of the rows that can be read and have a class.

    Raises:
        ValueError: there are none.
    """
    known = embedded(embedder, modality, media)
    numbers = known.rows.numpy()
    kept = truth[numbers] >= 0
    errors = known.errors | {int(row): "has no label." for row in np.flatnonzero(truth < 0)}
    if not kept.any():
        raise ValueError(f"No row can be read; the first: {next(iter(errors.values()), 'there are none')}")
    found = Known(
        known.vectors[torch.from_numpy(kept)], known.rows[torch.from_numpy(kept)], dict(sorted(errors.items()))
    )
    return found, truth[numbers[kept]]


def probed(
    task: str, folder: str, data: Data, modality: str, options: Mapping[str, Any]
) -> tuple[list[str], tuple[Any, ...], tuple[np.ndarray, np.ndarray], Report]:
    """The classes' names; of the rows that are judged features, classes, numbers and media; of those to learn from
    features and classes; and the report to fill."""
    embedder = Embedder.from_pretrained(folder, **options)
    embedder.check_one_vector("A probe")
    parts = []
    for split in (data.split, data.train_split):
        rows = data.rows(split)
        media = data.column(rows, modality)
        truth, names = labelled(data, rows)
        parts.append((rows, media, names, *labelled_vectors(embedder, modality, media, truth)))
    (rows, media, names, known, truth), (_, _, _, train, train_truth) = parts
    report = Report(task, folder, data.dataset, len(truth), {}, [], errors=known.errors)
    report.about = about_model(embedder.model) | data.about(rows, [modality, "label"])
    report.about |= {"unreadable training rows": len(train.errors)}
    numbers = known.rows.tolist()
    test = (known.vectors.numpy(), truth, numbers, [media[i] for i in numbers])
    return names, test, (train.vectors.numpy(), train_truth), report


def worst(media: Sequence[Any], scores: np.ndarray, truth: np.ndarray, names: list[str]) -> list[Mistake]:
    """The rows whose own class lies farthest below another one."""
    own = scores[np.arange(len(truth)), truth]
    order = np.argsort(own - scores.max(axis=1), kind="stable")[:MOST_MISTAKES].tolist()
    return [
        Mistake(path_of(media[i]), f"{names[scores[i].argmax()]} (not: {names[truth[i]]})")
        for i in order
        if scores[i].argmax() != truth[i]
    ]


def evaluate(task: str, folder: str | Path, data: Data, **options: Any) -> Report:
    """Run one of TASKS. Rows that cannot be read are left out, and counted in the report.

    Raises:
        ValueError: there is no such task, the data lack a column, or no row can be read.
    """
    if task not in TASKS:
        raise ValueError(f"No task is called {task!r}; there are {', '.join(TASKS)}.")
    return TASKS[task](str(folder), data, **options)
