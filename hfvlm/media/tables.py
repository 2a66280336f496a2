"""Columns of numbers from CSV files, data frames and mappings."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hfvlm.media.errors import MediaError
from hfvlm.media.sources import opened, short

MAX_BYTES = 2**28
DELIMITERS = (",", ";", "\t", "|", " ")
SUFFIXES = (".csv", ".tsv", ".txt")


class Table:
    """Columns by their names.

    Args:
        columns: the values of each, all of one length.
        name: for errors.
    """

    def __init__(self, columns: Mapping[str, Any], name: str):
        self.columns, self.name = columns, name

    def column(self, name: str) -> np.ndarray:
        """Return one column as `(N,)`, float64; NaN where a cell is empty.

        Raises:
            MediaError: there is none of that name, or a cell is no number.
        """
        if name not in self.columns:
            raise MediaError(f"{self.name}: has no column {short(name)!r}; {self.named()}.")
        values = self.columns[name]
        try:
            return np.array([float(v) if v not in ("", None) else np.nan for v in values], np.float64)
        except (TypeError, ValueError) as error:
            raise MediaError(f"{self.name}, column {short(name)!r}: {short(error)}.") from error

    def named(self) -> str:
        """List the names of the columns, for errors."""
        return f"it has {short(', '.join(map(str, self.columns)))}"


def read_table(source: Any, name: str) -> Table | None:
    """Read a pandas, Polars or Arrow table, or a CSV file as a path, bytes or an open file; None for anything else.

    A CSV file has its columns' names in its first row; rows that begin with # are comments. Commas, semicolons, tabs,
    bars and blanks separate columns.
    """
    names = getattr(source, "column_names", getattr(source, "columns", None))
    if names is not None and not isinstance(source, str | bytes | os.PathLike) and hasattr(source, "__getitem__"):
        return Table({str(column): _values(source[column]) for column in names if isinstance(column, str)}, name)
    if isinstance(source, np.ndarray | list | tuple | Mapping):
        return None
    with opened(source, name, allow_urls=False) as file:
        if file is None:
            return None
        data = file.read(MAX_BYTES + 1)
        file.seek(0)
    if len(data) > MAX_BYTES:
        raise MediaError(f"{name}: more than {MAX_BYTES // 2**20} MiB. Cut it into parts.")
    return None if data.startswith(b"\x93NUMPY") else _from_csv(data, name)


def _values(column: Any) -> Sequence[Any]:
    return column.to_pylist() if hasattr(column, "to_pylist") else list(column)


def _from_csv(data: bytes, name: str) -> Table | None:
    if b"\0" in data[:4096]:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    delimiter = max(DELIMITERS, key=lambda d: lines[0].count(d) if lines else 0)
    if len(lines) < 2 or delimiter not in lines[0]:
        return None
    try:
        rows = list(csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter, skipinitialspace=True))
    except csv.Error as error:
        raise MediaError(f"{name}: no CSV file ({short(error)}).") from error
    head = [cell.strip() for cell in rows[0]]
    for i, row in enumerate(rows[1:], start=2):
        if len(row) != len(head):
            raise MediaError(f"{name}: row {i} has {len(row)} cells, and the first has {len(head)}.")
    return Table(dict(zip(head, zip(*rows[1:], strict=True), strict=False)), name)
