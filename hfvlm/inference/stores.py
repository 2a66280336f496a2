"""Where a run puts its shards: Parquet files, a LanceDB table or a Qdrant collection, and what is nearest in them."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hfvlm.inference.index import highest
from hfvlm.writing import replaced

# Columns of a row of vectors, before those of its vectors.
ABOUT = ("row", "id", "path", "caption")


class Store(ABC):
    """The shards of a run.

    Args:
        folder: of the run.
        name: of the shards.
    """

    kind: ClassVar[str]
    suffix: ClassVar[str]  # of the file that shows that a shard is complete

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name

    def path(self, number: int) -> Path:
        """Return the file that shows that a shard is complete."""
        return self.folder / f"{self.name}-{number:05}{self.suffix}"

    def shards(self) -> dict[int, Path]:
        """Return the files of the shards that are complete, by number, in order."""
        named = re.compile(rf"{re.escape(self.name)}-(\d{{5,}}){re.escape(self.suffix)}")
        found = ((named.fullmatch(path.name), path) for path in self.folder.glob(f"{self.name}-*{self.suffix}"))
        return dict(sorted((int(match[1]), path) for match, path in found if match))

    def foreign(self) -> str | None:
        """Return what is there already though no run began; None for nothing."""
        return next((path.name for path in sorted(self.folder.glob(f"{self.name}-*{self.suffix}"))), None)

    @abstractmethod
    def resume(self, shard_rows: int) -> None:
        """Make what an earlier run left fit to go on with.

        Raises:
            ValueError: rows of complete shards are gone.
        """

    @abstractmethod
    def write(self, number: int, table: Any) -> None:
        """Write the rows of a shard, a pyarrow table, all or none of which are there afterwards."""

    @abstractmethod
    def finish(self) -> None:
        """Put in order what many writes left."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and connections."""

    @abstractmethod
    def count(self) -> int:
        """Count the rows of complete shards."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return the columns of vectors, with their lengths; none before there is a row."""

    @abstractmethod
    def tables(self, columns: Sequence[str]) -> Iterator[Any]:
        """Yield the rows as pyarrow tables of these columns; in order of the rows' numbers where shards are files."""

    @abstractmethod
    def nearest(self, modality: str, query: np.ndarray, count: int) -> Any:
        """Find the rows with the highest products with a query.

        Args:
            modality: the column.
            query: `(D,)`, float32, of unit length.
            count: of rows; fewer are returned where there are no more.

        Returns:
            A pyarrow table of ABOUT and the modality's vectors, without an order.
        """


class ParquetStore(Store):
    """Shards as Parquet files."""

    kind, suffix = "parquet", ".parquet"

    def resume(self, shard_rows: int) -> None:
        """Do nothing: a file that is there is complete."""

    def finish(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def write(self, number: int, table: Any) -> None:
        from pyarrow import parquet

        with replaced(self.path(number)) as file:
            parquet.write_table(table, file)

    def count(self) -> int:
        from pyarrow import parquet

        return sum(parquet.read_metadata(path).num_rows for path in self.shards().values())

    def sizes(self) -> dict[str, int]:
        from pyarrow import parquet

        first = next(iter(self.shards().values()), None)
        return {} if first is None else vector_columns(parquet.read_schema(first))

    def tables(self, columns: Sequence[str]) -> Iterator[Any]:
        """Yield a table for each shard; captions, which older runs did not store, are left out there."""
        from pyarrow import parquet

        for path in self.shards().values():
            known = parquet.read_schema(path).names
            yield parquet.read_table(path, columns=[name for name in columns if name in known])

    def nearest(self, modality: str, query: np.ndarray, count: int) -> Any:
        """Go through the shards; one of them is in memory at a time."""
        import pyarrow

        best, scores = None, np.empty(0, np.float32)
        for table in self.tables([*ABOUT, modality]):
            table = table.filter(table[modality].is_valid())
            if not table.num_rows:
                continue
            found = matrix(table[modality]) @ query
            chosen = highest(found[None], count)[0]
            table, scores = table.take(chosen), np.concatenate([scores, found[chosen]])
            best = table if best is None else pyarrow.concat_tables([best, table])
            chosen = highest(scores[None], count)[0]
            best, scores = best.take(chosen), scores[chosen]
        return best if best is not None else pyarrow.Table.from_pylist([], schema_of({modality: len(query)}))


class DatabaseStore(Store):
    """Shards in one table of a database; a small file for each shows that it is complete, and counts its rows."""

    suffix = ".json"

    def finish(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def write(self, number: int, table: Any) -> None:
        if table.num_rows:
            self.insert(table)
        with replaced(self.path(number)) as file:
            file.write_text(json.dumps({"rows": table.num_rows}) + "\n", encoding="utf-8")

    @abstractmethod
    def insert(self, table: Any) -> None:
        """Write rows into the database, in the place of rows of the same number."""

    def count(self) -> int:
        return sum(json.loads(path.read_text(encoding="utf-8"))["rows"] for path in self.shards().values())

    def check_count(self, found: int, where: str, *, exactly: bool) -> None:
        """Refuse to go on in a database from which rows are gone.

        Raises:
            ValueError: they are.
        """
        expected = self.count()
        if found < expected or (exactly and found != expected):
            raise ValueError(
                f"{where}: has {found} rows, but the shards that {self.folder} lists have {expected}: embed to "
                "another output, or remove both."
            )


def schema_of(sizes: Mapping[str, int]) -> Any:
    """Return the pyarrow schema of rows with vectors of these lengths, by modality."""
    import pyarrow

    types = {"row": pyarrow.int64()} | dict.fromkeys(ABOUT[1:], pyarrow.string())
    return pyarrow.schema([*types.items(), *((name, vector_type(size)) for name, size in sizes.items())])


def vector_columns(schema: Any) -> dict[str, int]:
    """Return the columns of vectors of a pyarrow schema, with their lengths."""
    return {field.name: field.type.list_size for field in schema if field.name not in ABOUT}


def vector_type(size: int) -> Any:
    """Return pyarrow's type of float32 vectors of one length."""
    import pyarrow

    return pyarrow.list_(pyarrow.float32(), size)


def matrix(column: Any) -> np.ndarray:
    """Return a column of vectors, none of which is null, as `(N, D)`."""
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)
