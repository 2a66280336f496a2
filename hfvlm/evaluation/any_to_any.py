"""Recall of every modality by every other one, in one report."""

from collections.abc import Mapping, Sequence
from itertools import permutations
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvlm.evaluation.data import Data, Embedded
from hfvlm.evaluation.embedding import KS, compared_modalities
from hfvlm.evaluation.report import Report, Result, matrix_plot
from hfvlm.evaluation.retrieval import positive_ranks
from hfvlm.evaluation.tables import Table
from hfvlm.inference.embedder import Embedder

# A single row is found by any model.
FEWEST = 2


def any_to_any(
    folder: str,
    data: Data,
    *,
    between: Sequence[str] | str = "any",
    positives: str | None = None,
    **options: Any,
) -> Report:
    """Find each modality by each other one, among the rows that have both.

    Unlike `retrieval`, a row needs not every modality: each pair has a count of its own.

    Args:
        folder: the model's.
        data: with two modalities or more, of which rows may lack some.
        between: ["audio", "text"]; "any" for all that the data and the model have.
        positives: a column; rows of equal value are each other's positives, as those of one class. By default a row
            has itself alone.
        **options: of `Embedder.from_pretrained`.

    Raises:
        ValueError: the data or the model lack a modality, or no two rows have two modalities in common.
    """
    rows = data.rows()
    embedder = Embedder.from_pretrained(folder, **options)
    modalities = compared_modalities(data, rows, embedder, between)
    groups = groups_of(data, rows, positives)
    columns = {m: data.column(rows, m) for m in modalities}
    embedded = {m: embed_present(data, embedder, m, values) for m, values in columns.items()}
    errors = errors_by_row(embedded)
    pairs = {(a, b): common_rows(embedded[a], embedded[b]) for a, b in permutations(modalities, 2)}
    measured = {pair: both for pair, both in pairs.items() if len(both) >= FEWEST}
    if not measured:
        first = next(iter(errors.values()), "none has two of them")
        raise ValueError(f"{data.dataset}: no two rows have two of {', '.join(modalities)} in common; {first}.")
    found = {row for both in measured.values() for row in both.tolist()}
    protocol: dict[str, Any] = {"positives": f"rows of equal {positives}" if positives else "the same row"}
    protocol["split"] = data.split
    report = Report("any-to-any", folder, data.dataset, len(found), protocol, errors=errors)
    report.about = data.about(rows, [*modalities, *([positives] if positives else [])], embedder.model)
    report.about["rows with"] = {m: len(own.rows.unique()) for m, own in embedded.items()}
    score = getattr(embedder.model, "score", None)
    for (a, b), both in measured.items():
        queries, gallery = (embedded[m].among(both, {}) for m in (a, b))
        ids = groups[queries.rows], groups[gallery.rows]
        ranks = positive_ranks(queries.vectors, gallery.vectors, *ids, score=score).numpy()
        for k in KS:
            report.add(f"{a} to {b} recall@{k}", queries.rows.tolist(), ranks < k)
        report.about.setdefault("chance of recall@1", {})[f"{a} to {b}"] = round(chance(*ids), 4)
    add_tables(report, modalities)
    add_means(report, list(measured), anchors_of(embedder.model))
    return report


def groups_of(data: Data, rows: Any, positives: str | None) -> Tensor:
    """Return a number for each row, `(N,)`, equal of rows that are each other's positives; a row without a value has
    itself alone."""
    if positives is None:
        return torch.arange(len(rows))
    numbers: dict[Any, int] = {}
    values = [("row", i) if value is None else str(value) for i, value in enumerate(data.column(rows, positives))]
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])


def embed_present(data: Data, embedder: Embedder, modality: str, values: Sequence[Any]) -> Embedded:
    """Embed a column's values, without those of rows that have none."""
    present = [row for row, value in enumerate(values) if is_there(value)]
    found = data.embed(embedder, modality, [values[row] for row in present])
    errors = {present[i]: error for i, error in found.errors.items()}
    return Embedded(found.vectors, torch.tensor(present, dtype=torch.long)[found.rows], errors)


def is_there(value: Any) -> bool:
    """Check whether a row has a value; a cell without bytes and path has none."""
    if isinstance(value, Mapping) and {"bytes", "path"} == value.keys():
        return value["bytes"] is not None or value["path"] is not None
    return value is not None and not (isinstance(value, str | list) and not value)


def errors_by_row(embedded: Mapping[str, Embedded]) -> dict[int, str]:
    """Return what is wrong with the media of each row that has damaged ones."""
    found: dict[int, list[str]] = {}
    for modality, own in embedded.items():
        for row, error in own.errors.items():
            found.setdefault(row, []).append(f"{modality}: {error}")
    return {row: "; ".join(found[row]) for row in sorted(found)}


def common_rows(a: Embedded, b: Embedded) -> Tensor:
    """Return the numbers of the rows that are in both."""
    rows = a.rows.unique()
    return rows[torch.isin(rows, b.rows)]


def chance(query_ids: Tensor, gallery_ids: Tensor) -> float:
    """Return the recall@1 of a random order: the mean share of positives in the gallery."""
    ids, counts = gallery_ids.unique(return_counts=True)
    return float(counts[torch.searchsorted(ids, query_ids)].double().mean() / len(gallery_ids))


def add_tables(report: Report, modalities: list[str]) -> None:
    """Add a table of modalities by modalities for each k, with the number of queries in each cell."""
    results = {result.metric: result for result in report.results}
    for k in KS:
        names = {(a, b): f"{a} to {b} recall@{k}" for a in modalities for b in modalities}
        rows = [[a, *(cell(results.get(names[a, b])) for b in modalities)] for a in modalities]
        report.tables.append(
            Table(f"recall@{k} (queries)", ["query", *modalities], rows, [n for n in names.values() if n in results])
        )
    best = {pair: results[name] for pair, name in names_at_1(modalities).items() if name in results}
    values = [[best[a, b].value if (a, b) in best else np.nan for b in modalities] for a in modalities]
    report.plots = {"recall@1": matrix_plot(modalities, np.array(values))}


def names_at_1(modalities: list[str]) -> dict[tuple[str, str], str]:
    return {(a, b): f"{a} to {b} recall@1" for a in modalities for b in modalities}


def cell(result: Result | None) -> str:
    return "-" if result is None else f"{result.value:.3f} ({result.n})"


def anchors_of(model: Any) -> list[str]:
    """List the modalities that a model was trained in pairs with: those of its anchor's tower, as images and videos;
    none of a model without one."""
    anchor = getattr(model, "anchor", None)
    return [m for m in model.modalities if anchor is not None and model.towers[m] == model.towers[anchor]]


def add_means(report: Report, pairs: list[tuple[str, str]], anchors: list[str]) -> None:
    """Add means over pairs: over all, and over those with and without the modalities that a model was trained in
    pairs with."""
    values = {result.metric: result.value for result in report.results}
    kinds = {"mean recall@1": pairs}
    if anchors:
        bound = [pair for pair in pairs if set(pair) & set(anchors)]
        name = " or ".join(anchors)
        kinds[f"mean recall@1, pairs with {name}"] = bound
        kinds[f"mean recall@1, pairs without {name}"] = [pair for pair in pairs if pair not in bound]
    for name, own in kinds.items():
        if own:
            mean = fmean(values[f"{a} to {b} recall@1"] for a, b in own)
            report.results.append(Result(name, mean, n=len(own)))
