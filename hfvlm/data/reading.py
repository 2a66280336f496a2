"""Rows that a procedure reads: as a stream, in shards, with the files that they come from."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hfvlm.checks.messages import cut, listed
from hfvlm.inference.pins import Pins, pin, pinned_data
from hfvlm.inference.shards import Row, absolute, earlier_data, named
from hfvlm.media.errors import MediaError
from hfvlm.media.rows import captions_of, columns_by_name, encoded, load_rows
from hfvlm.media.sources import import_extra, opened

# Files that may be given instead of a folder, and the reader of `datasets` for each.
READERS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".tar": "webdataset",
}  # fmt: skip
# Rows by which the types of columns are found, where the files do not define them.
PEEKED = 1000
LONGEST = 200


@dataclass(frozen=True)
class Source:
    """A data set that streams.

    Args:
        location: its folder, file or Hub id.
        split: of it.
        rows: a `datasets.IterableDataset`, media still encoded.
        columns: the column of each modality.
        id_column: the column that names the rows; None for webdataset's `__key__`, the image's path or the number.
        pins: the files, by content.
        schema: Arrow's, of a row.
    """

    location: str
    split: str
    rows: Any
    columns: Mapping[str, str]
    id_column: str | None
    pins: Pins
    schema: Any

    @property
    def settings(self) -> dict[str, Any]:
        """What the content of an output depends on, apart from the files."""
        return {
            "source": self.location, "split": self.split, "columns": dict(self.columns), "id_column": self.id_column,
        }  # fmt: skip

    def shards(self, first: int, size: int) -> Iterator[tuple[int, list[Row]]]:
        """Yield shards of numbered rows from shard `first` on."""
        number, remaining = first, iter(self.rows.skip(first * size))
        while shard := list(islice(remaining, size)):
            yield number, [(number * size + i, self.located(row)) for i, row in enumerate(shard)]
            number += 1

    def located(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row whose media paths are absolute: those of files are relative to their folder."""
        changed = {
            column: str(self.folder / value)
            for modality, column in self.columns.items()
            if modality != "text" and isinstance(value := row.get(column), str) and value
            and not Path(value).is_absolute() and (self.folder / value).is_file()
        }  # fmt: skip
        return row | changed

    @property
    def folder(self) -> Path:
        """The folder of the data set's files."""
        path = Path(self.location)
        return path.parent if path.is_file() else path

    def note(self, error: ValueError) -> str:
        """Return an error's message, which names files of the data set by their paths within its folder."""
        return str(error).replace(f"{self.folder.resolve()}/", "").replace(f"{self.folder}/", "")

    def needs(self, *modalities: str) -> None:
        """Refuse a data set without a column of each modality.

        Raises:
            ValueError: it has none.
        """
        for modality in modalities:
            if modality not in self.columns:
                raise ValueError(
                    f"{self.location}: no column of it holds {modality}s: name one, as --column {modality}=COLUMN; it "
                    f"has {listed(self.schema.names)}."
                )

    def media(self, row: Mapping[str, Any], modality: str = "image") -> Any:
        """Return a row's image, or other media, as the readers of `hfvlm.media` take it."""
        return row.get(self.columns[modality])

    def texts(self, row: Mapping[str, Any]) -> list[str]:
        """Return a row's captions; none for a row without any."""
        value = row.get(self.columns["text"])
        return [] if value is None or value == [] else captions_of(value)

    def shown(self, row: Mapping[str, Any]) -> str:
        """Return the beginning of a row's first caption, for reports."""
        texts = self.texts(row) if "text" in self.columns else []
        return cut(texts[0], LONGEST) if texts else ""

    def name(self, number: int, row: Mapping[str, Any]) -> str:
        """Return a row's id."""
        media = [column for modality, column in self.columns.items() if modality != "text"]
        return named(number, row, media, self.id_column)[0]


def open_source(
    location: str | Path,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    id_column: str | None = None,
    earlier: Pins | None = None,
) -> Source:
    """Open a data set: a folder of media, of JSON lines, CSV, Parquet or webdataset tars, one such file, or a Hub id.

    Args:
        location: of it.
        split: of it.
        columns: {"image": "photo", "text": "alt"}; by default by their usual names.
        id_column: the column that names the rows.
        earlier: pins of an earlier run over it.

    Raises:
        ValueError: it holds no rows, or lacks a column that is named.
    """
    location = Path(location).resolve() if Path(location).is_file() else absolute(location)
    if isinstance(location, Path):
        rows, pins = load_file(location), {location.name: pin(location, (earlier or {}).get(location.name))}
    else:
        rows, pins = load_rows(location, split=split, streaming=True), pinned_data(location, split, earlier)
    schema = schema_of(rows, str(location))
    found = dict(columns or columns_by_name(schema.names))
    if missing := [name for name in (*found.values(), *filter(None, [id_column])) if name not in schema.names]:
        raise ValueError(f"{location}: has no column {', '.join(missing)}; it has {', '.join(schema.names)}.")
    return Source(str(location), split, rows, found, id_column, pins, schema)


def as_source(source: Source | str | Path, output: str | Path) -> Source:
    """Return an opened source as it is, and open any other, whose files an earlier run into `output` may know."""
    return source if isinstance(source, Source) else open_source(source, earlier=earlier_data(Path(output)))


def load_file(path: Path) -> Any:
    """Stream the rows of one file, media still encoded.

    Raises:
        ValueError: its name does not end as one of a file of rows, or it is empty.
    """
    kind = READERS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: rows are read from {', '.join(READERS)} files and from folders.")
    options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    load = import_extra("datasets", "train", "Reading data sets").load_dataset
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file holds no rows.")
    rows = load(kind, data_files=str(path), split="train", streaming=True, **options)
    return rows if rows.features is None else rows.cast(encoded(rows.features))


def schema_of(rows: Any, name: str) -> Any:
    """Return Arrow's schema of the rows, which the files define or the first thousand rows do.

    Raises:
        ValueError: there are no rows.
    """
    import pyarrow

    if rows.features is not None:
        import datasets

        return datasets.Features(rows.features).arrow_schema
    peeked = list(islice(iter(rows), PEEKED))
    if not peeked:
        raise ValueError(f"{name}: the data set holds no rows.")
    columns = list(dict.fromkeys(column for row in peeked for column in row))
    found = {column: pyarrow.array([row.get(column) for row in peeked]).type for column in columns}
    return pyarrow.schema([(c, pyarrow.string() if t == pyarrow.null() else t) for c, t in found.items()])


def table_of(rows: list[dict[str, Any]], schema: Any, name: str) -> Any:
    """Return rows as a table of Arrow.

    Raises:
        ValueError: a value is of another type than those before it.
    """
    import pyarrow

    try:
        return pyarrow.Table.from_pylist(rows, schema)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ValueError(f"{name}: a row has a value of another type than the rows before it: {error}") from error


def content_of(media: Any) -> bytes:
    """Return a hash of the encoded bytes of an image or another file.

    Raises:
        MediaError: it cannot be read.
    """
    with opened(media, "image", allow_urls=False) as file:
        if file is None:
            raise MediaError("image: neither a path nor bytes.")
        digest = hashlib.blake2b(digest_size=16)
        while block := file.read(2**20):
            digest.update(block)
    return digest.digest()
