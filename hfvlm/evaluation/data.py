"""The rows that an evaluation measures: their columns, classes, texts and vectors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvlm.checks.ranges import check_integer
from hfvlm.evaluation.fingerprints import fingerprint
from hfvlm.inference.embedder import Embedder
from hfvlm.media.rows import captions_of, columns_by_name, load_rows


@dataclass
class Data:
    """What to evaluate on.

    Args:
        dataset: what `hfvlm.media.rows.load_rows` reads: a folder of media in folders of classes or with
            metadata.jsonl, tars, Parquet, a Hub id.
        split: the rows that are measured.
        train_split: the rows that probes learn from.
        columns: {"image": "photo", "label": "species"}; by default columns called as what they hold: "image" and the
            other modalities, "text" (or "caption", "captions"), "label", "question", "answers", "box", ...
        source_options: of the processor, by modality: {"imu": {"sampling_rate": 200}}.
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
    source_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_integer("limit", self.limit)
        check_integer("seed", self.seed, 0)

    def rows(self, split: str | None = None) -> Any:
        """Read a split, by default the measured one, up to the limit."""
        rows = load_rows(self.dataset, split=split or self.split)
        if self.limit is not None and self.limit < len(rows):
            order = np.random.default_rng(self.seed).permutation(len(rows))[: self.limit]
            rows = rows.select(sorted(order.tolist()))
        return rows

    def column_name(self, rows: Any, name: str) -> str | None:
        """Find the column of what is called `name` here, if there is one."""
        column = (columns_by_name(rows.column_names) | dict(self.columns or {})).get(name, name)
        return column if column in rows.column_names else None

    def column(self, rows: Any, name: str) -> Sequence[Any]:
        """Return the values of what is called `name` here.

        Raises:
            ValueError: there is no such column.
        """
        column = self.column_name(rows, name)
        if column is None:
            known, wanted = ", ".join(rows.column_names), f"columns={{{name!r}: ...}} (--column {name}=...)"
            raise ValueError(f"{self.dataset}: has no column for {name}; name one of {known}, as {wanted}.")
        return rows[column]

    def about(self, rows: Any, names: Sequence[str], model: Any) -> dict[str, Any]:
        """Describe a model and the rows that it is measured on, for a report, with a hash of the columns' content."""
        dtype = str(model.dtype).removeprefix("torch.")
        columns = {name: self.column_name(rows, name) for name in names}
        options = {name: dict(given) for name, given in self.source_options.items()}
        return {
            "class": type(model).__name__, "dtype": dtype, "device": model.device.type, "columns": columns,
            "split": self.split, "limit": self.limit, "seed": self.seed, "of": len(rows),
            "fingerprint": fingerprint({name: rows[column] for name, column in columns.items() if column}),
        } | ({"options": options} if options else {})  # fmt: skip

    def check_options(self, modalities: Sequence[str]) -> None:
        """Refuse options of modalities that are not measured.

        Raises:
            ValueError: there are some.
        """
        if unused := sorted(set(self.source_options) - set(modalities)):
            raise ValueError(
                f"source_options are given for {', '.join(unused)}; what is measured here: {', '.join(modalities)}."
            )

    def embed(self, embedder: Embedder, modality: str, values: Sequence[Any]) -> "Embedded":
        """Embed a column's values, as the options of their modality read them."""
        return embed_column(embedder, modality, values, self.source_options.get(modality))

    def own_labels(self, rows: Any) -> list[str] | None:
        """Return the names of the classes that the label column has itself; None of numbers without names."""
        values = self.column(rows, "label")
        feature = rows.features.get(self.column_name(rows, "label"))
        given = sorted({value for value in values if value is not None}, key=str)
        return getattr(feature, "names", None) or (None if is_numbers(given) else [str(value) for value in given])

    def labels(self, rows: Any, names: Sequence[str] | None = None) -> tuple[np.ndarray, list[str]]:
        """Return each row's class, -1 for rows without one, and the classes' names.

        Args:
            rows: with a column of labels.
            names: of the classes, in order; by default the column's own, with spaces for underscores.

        Raises:
            ValueError: the labels have no names, or a row has a class without one.
        """
        values = self.column(rows, "label")
        feature = rows.features.get(self.column_name(rows, "label"))
        given = [value for value in values if value is not None]
        known = list(names or getattr(feature, "names", None) or sorted({str(value) for value in given}))
        if is_numbers(given):
            if not names and not hasattr(feature, "names"):
                raise ValueError(f"{self.dataset}: its labels are numbers; give the classes' names with labels.")
            if wrong := [value for value in given if value >= len(known)]:
                raise ValueError(f"{self.dataset}: label {wrong[0]} is beyond the {len(known)} names that were given.")
            numbers = {value: value for value in given}
        else:
            numbers = {name: i for i, name in enumerate(known)}
            if unknown := sorted({str(value) for value in given} - set(numbers)):
                raise ValueError(f"{self.dataset}: label {unknown[0]!r} is not among the names that were given.")
            values = [None if value is None else str(value) for value in values]
        truth = np.array([-1 if value is None else numbers[value] for value in values])
        return truth, known if names else [name.replace("_", " ") for name in known]


def is_numbers(labels: Sequence[Any]) -> bool:
    return all(isinstance(label, int) for label in labels)


@dataclass
class Embedded:
    """The vectors of a column, of the rows that can be read.

    Args:
        vectors: `(N, D)`.
        rows: their row numbers, `(N,)`; a row may have several captions.
        errors: by row number, what is wrong with the others.
    """

    vectors: Tensor
    rows: Tensor
    errors: dict[int, str] = field(default_factory=dict)

    def among(self, rows: Tensor, errors: Mapping[int, str]) -> "Embedded":
        """Select the vectors of some rows, with what is wrong with all others."""
        selected = torch.isin(self.rows, rows)
        return Embedded(self.vectors[selected], self.rows[selected], dict(sorted(errors.items())))


def embed_column(
    embedder: Embedder, modality: str, values: Sequence[Any], options: Mapping[str, Any] | None = None
) -> Embedded:
    """Embed a column's values, of texts every caption, with options of the processor."""
    if modality == "text":
        texts, errors = read_texts(values)
        rows = [row for row, captions in texts.items() for _ in captions]
        values = [caption for captions in texts.values() for caption in captions]
    else:
        rows, errors = list(range(len(values))), {}
    vectors, readable, wrong = embedder.encode_known(modality, values, progress=True, **(options or {}))
    errors |= {rows[i]: error for i, error in wrong.items()}
    return Embedded(vectors, torch.tensor([rows[i] for i in readable], dtype=torch.long), dict(sorted(errors.items())))


def embed_labelled(
    data: Data, embedder: Embedder, modality: str, media: Sequence[Any], truth: np.ndarray
) -> tuple[Embedded, np.ndarray]:
    """Embed the rows that can be read and have a class; return them with their classes.

    Raises:
        ValueError: there are none.
    """
    embedded = data.embed(embedder, modality, media)
    errors = embedded.errors | {int(row): "has no label." for row in np.flatnonzero(truth < 0)}
    found = embedded.among(torch.from_numpy(np.flatnonzero(truth >= 0)), errors)
    check_any(found.rows, errors)
    return found, truth[found.rows.numpy()]


def read_texts(values: Sequence[Any]) -> tuple[dict[int, list[str]], dict[int, str]]:
    """Return, by row number, the texts of a column, and what is wrong with the rows without any."""
    found, errors = {}, {}
    for row, value in enumerate(values):
        try:
            found[row] = captions_of(value)
        except ValueError as error:
            errors[row] = str(error)
    return found, errors


def check_any(found: Any, errors: Mapping[int, str]) -> None:
    """Refuse data of which no row can be measured.

    Raises:
        ValueError: nothing is found; the message has the first error.
    """
    if not len(found):
        raise ValueError(f"No row can be read; the first: {next(iter(errors.values()), 'there are none')}")
