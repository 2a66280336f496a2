"""The evaluations of models that embed: zero-shot classification, retrieval, probes."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
import torch

from hfvlm.checks.ranges import check_integer
from hfvlm.evaluation.classification import confusion, label_ranks, mean_per_class_accuracy
from hfvlm.evaluation.data import Data, Embedded, embed_labelled
from hfvlm.evaluation.probing import best_c, few_shot_curve, fit
from hfvlm.evaluation.prompt_sets import PromptSet, load_prompt_set
from hfvlm.evaluation.report import MOST_MISTAKES, Mistake, Report, Result, confusion_plot, recall_plot, shots_plot
from hfvlm.evaluation.retrieval import positive_ranks
from hfvlm.inference.embedder import Embedder
from hfvlm.inference.zero_shot import ZeroShotClassifier
from hfvlm.media.rows import COLUMNS, captions_of, path_of

KS = (1, 5, 10)
SHOTS = (1, 2, 4, 8, 16)


def zero_shot(
    folder: str,
    data: Data,
    *,
    templates: str | None = None,
    labels: Sequence[str] | None = None,
    prompts: str | None = None,
    modality: str = "image",
    **options: Any,
) -> Report:
    """Classify by the classes' names.

    Args:
        folder: the model's.
        data: with media and labels.
        templates: see `ZeroShotClassifier`; by default those of the prompts, or "single".
        labels: the classes' names; by default those of the label column, with spaces for underscores.
        prompts: names and templates of a data set of CLIP's paper, one of `hfvlm.evaluation.prompt_sets`.
        modality: of the media: image, video, audio, depth, thermal or imu.
        **options: of `Embedder.from_pretrained`.

    Raises:
        ValueError: there are no such prompts or templates, the data lack a column, or no row can be read.
    """
    data.check_options([modality])
    known = None if prompts is None else load_prompt_set(prompts)
    rows = data.rows()
    truth, classes, given, about = classes_and_templates(data, rows, labels, known)
    names, used = list(classes), templates or given
    classifier = ZeroShotClassifier.from_pretrained(folder, classes, used, **options)
    media = data.column(rows, modality)
    found, truth = embed_labelled(data, classifier.embedder, modality, media, truth)
    scores = classifier.compare(found.vectors.numpy())
    ranks = label_ranks(scores, truth)
    protocol = {"templates": used if isinstance(used, str) else f"{len(used)} of {prompts}", "classes": len(names)}
    protocol |= about | {"split": data.split} | ({} if modality == "image" else {"modality": modality})
    report = Report("zero-shot", folder, data.dataset, len(truth), protocol, errors=found.errors)
    report.about = data.about(rows, [modality, "label"], classifier.embedder.model)
    report.add("accuracy", found.rows.tolist(), ranks < 1)
    report.add("accuracy@5", found.rows.tolist(), ranks < 5)
    add_classes(report, scores, truth, names, [media[i] for i in found.rows.tolist()])
    return report


def classes_and_templates(
    data: Data, rows: Any, labels: Sequence[str] | None, prompts: PromptSet | None
) -> tuple[np.ndarray, list[str] | dict[str, list[str]], str | tuple[str, ...], dict[str, Any]]:
    """Return each row's class, the names of the classes, the templates, and what to say of these in a report.

    Raises:
        ValueError: names are given twice, or the data's own labels are none of the prompts' classes.
    """
    if prompts is None:
        truth, names = data.labels(rows, labels)
        return truth, names, "single", {}
    if labels is not None:
        raise ValueError(f"labels and prompts {prompts.name} both name the classes: give one of them.")
    own = data.own_labels(rows)
    truth, _ = data.labels(rows, own or list(prompts.classes))
    if own:
        truth = np.array([*prompts.numbers(own), -1])[truth]
    about = {"prompts": prompts.name, "the metric of CLIP's paper": prompts.metric}
    return truth, prompts.classes, prompts.templates, about


def retrieval(folder: str, data: Data, *, between: Sequence[str] | str | None = None, **options: Any) -> Report:
    """Find each modality by another, in both directions; all captions of a row are its positives.

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
    modalities = compared_modalities(data, rows, embedder, between)
    embedded = {m: data.embed(embedder, m, data.column(rows, m)) for m in modalities}
    errors = {row: f"{m}: {error}" for m, found in embedded.items() for row, error in found.errors.items()}
    readable = torch.tensor([row for row in range(len(rows)) if row not in errors], dtype=torch.long)
    if not len(readable):
        raise ValueError(f"{data.dataset}: no row can be read; row 0: {errors.get(0, 'there are none')}.")
    embedded = {m: found.among(readable, errors) for m, found in embedded.items()}
    captions = {"captions": len(embedded["text"].rows)} if "text" in embedded else {}
    protocol: dict[str, Any] = captions | {"split": data.split}
    errors = dict(sorted(errors.items()))
    report = Report("retrieval", folder, data.dataset, len(readable), protocol, errors=errors)
    report.about = data.about(rows, modalities, embedder.model)
    ranks: dict[str, np.ndarray] = {}
    score = getattr(embedder.model, "score", None)
    for a, b in (pair for both in combinations(modalities, 2) for pair in (both, both[::-1])):
        queries, gallery, name = embedded[a], embedded[b], f"{a} to {b}"
        found = positive_ranks(queries.vectors, gallery.vectors, queries.rows, gallery.rows, score=score)
        ranks[name] = found.numpy()
        for k in KS:
            report.add(f"{name} recall@{k}", queries.rows.tolist(), ranks[name] < k)
    report.plots = {"recall": recall_plot(ranks)}
    first, second = modalities[:2]
    columns = data.column(rows, first), data.column(rows, second)
    report.mistakes = missed_rows(columns, second, ranks[f"{first} to {second}"], embedded[first].rows.tolist())
    return report


def compared_modalities(data: Data, rows: Any, embedder: Embedder, between: Sequence[str] | str | None) -> list[str]:
    """Choose the modalities that are searched by one another.

    Raises:
        ValueError: there are fewer than two.
    """
    known = [m for m in COLUMNS if m in embedder.modalities and data.column_name(rows, m) is not None]
    if between is None:
        chosen = ["image", "text"] if {"image", "text"} <= set(known) else known
    else:
        chosen = known if between == "any" else [*([between] if isinstance(between, str) else between)]
        embedder.check(chosen)
        for modality in chosen:
            data.column(rows, modality)
    if len(set(chosen)) < 2:
        wanted = " and ".join(m for m in ("image", "text") if m not in known) or "a second modality"
        raise ValueError(
            f"{data.dataset}: has no column for {wanted}; name one of {', '.join(rows.column_names)}. The model "
            f"embeds {', '.join(embedder.modalities)}."
        )
    data.check_options(chosen)
    return list(dict.fromkeys(chosen))


def missed_rows(
    columns: tuple[Sequence[Any], Sequence[Any]], modality: str, ranks: np.ndarray, numbers: Sequence[int]
) -> list[Mistake]:
    """Collect the queries whose positives come last.

    Args:
        columns: of the queries and of the gallery.
        modality: of the gallery.
        ranks: how many wrong ones come before each query's best positive.
        numbers: the queries' row numbers.
    """
    mistakes = []
    for i in np.argsort(-ranks, kind="stable")[:MOST_MISTAKES].tolist():
        if ranks[i]:
            query, positive = (column[numbers[i]] for column in columns)
            what = captions_of(positive)[0] if modality == "text" else path_of(positive) or f"row {numbers[i]}"
            mistakes.append(Mistake(path_of(query), f"{ranks[i]} {modality}s before: {what}"))
    return mistakes


def linear_probe(folder: str, data: Data, *, modality: str = "image", **options: Any) -> Report:
    """Fit a logistic regression on frozen features, with its C chosen on a part of the training rows."""
    names, (test, truth, media), train, report = embed_splits("linear-probe", folder, data, modality, options)
    c = best_c(*train, seed=data.seed)
    scores = fit(*train, c).decision_function(test.vectors.numpy())
    scores = np.stack([-scores, scores], axis=1) if scores.ndim == 1 else scores
    report.add("accuracy", test.rows.tolist(), scores.argmax(axis=1) == truth)
    report.protocol = {"training rows": len(train[1]), "C": f"{c:.3g}"}
    report.protocol |= {"C chosen on": "20 % of the training rows", "split": data.split}
    add_classes(report, scores, truth, names, media)
    return report


def few_shot(
    folder: str, data: Data, *, shots: Sequence[int] = SHOTS, modality: str = "image", **options: Any
) -> Report:
    """Fit the same with few rows of each class, three draws of them each."""
    shots = [check_integer("shots", count) for count in shots]
    names, (test, truth, _), train, report = embed_splits("few-shot", folder, data, modality, options)
    c = best_c(*train, seed=data.seed)
    fewest = int(np.bincount(train[1]).min())
    curve = few_shot_curve(train, (test.vectors.numpy(), truth), [count for count in shots if count <= fewest], c)
    report.results = [
        Result(f"accuracy, {count} shots", fmean(v), min(v), max(v), len(truth)) for count, v in curve.items()
    ]
    report.protocol = {
        "draws": 3,
        "C": f"{c:.3g}",
        "intervals": "lowest and highest of the draws",
        "classes": len(names),
        "split": data.split,
    }
    report.plots = {"shots": shots_plot(curve, None)}
    return report


def embed_splits(
    task: str, folder: str, data: Data, modality: str, options: Mapping[str, Any]
) -> tuple[list[str], tuple[Embedded, np.ndarray, list[Any]], tuple[np.ndarray, np.ndarray], Report]:
    """Return the classes' names, the measured rows with their classes and media, the features and classes of the rows
    to learn from, and the report to fill."""
    data.check_options([modality])
    embedder = Embedder.from_pretrained(folder, **options)
    embedder.check_one_vector("A probe")
    parts = []
    for split in (data.split, data.train_split):
        rows = data.rows(split)
        media = data.column(rows, modality)
        truth, names = data.labels(rows)
        parts.append((rows, media, names, *embed_labelled(data, embedder, modality, media, truth)))
    (rows, media, names, test, truth), (*_, train, train_truth) = parts
    report = Report(task, folder, data.dataset, len(truth), errors=test.errors)
    report.about = data.about(rows, [modality, "label"], embedder.model)
    report.about |= {"unreadable training rows": len(train.errors)}
    measured = test, truth, [media[i] for i in test.rows.tolist()]
    return names, measured, (train.vectors.numpy(), train_truth), report


def add_classes(report: Report, scores: np.ndarray, truth: np.ndarray, names: list[str], media: Sequence[Any]) -> None:
    """Add to a report what becomes of each class, and the rows whose own class lies farthest below another one."""
    predictions = scores.argmax(axis=1)
    mean = mean_per_class_accuracy(predictions, truth)
    report.results.append(Result("mean-per-class accuracy", mean, n=len(truth)))
    report.plots = {"confusion": confusion_plot(confusion(predictions, truth, len(names)), names)}
    own = scores[np.arange(len(truth)), truth]
    report.mistakes = [
        Mistake(path_of(media[i]), f"{names[predictions[i]]} (not: {names[truth[i]]})")
        for i in np.argsort(own - scores.max(axis=1), kind="stable")[:MOST_MISTAKES].tolist()
        if predictions[i] != truth[i]
    ]
