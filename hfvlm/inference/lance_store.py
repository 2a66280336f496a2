"""Shards of vectors in a LanceDB table."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hfvlm.inference.stores import ABOUT, DatabaseStore, vector_columns
from hfvlm.media.sources import import_extra

TABLE = "vectors"
# Writes after which small files are put together.
TOGETHER = 256
# What becomes of rows without one of the vectors, which have a null there.
MISSING = "null"


class LanceStore(DatabaseStore):
    """Shards in a LanceDB table (`pip install 'hfvlm[lancedb]'`), in the folder `lancedb` of the run's.

    The table has the columns of Parquet's shards: whatever knows LanceDB reads it, and may make an index in it.
    """

    kind = "lancedb"

    def __init__(self, folder: Path, name: str):
        super().__init__(folder, name)
        self.lancedb = import_extra("lancedb", "lancedb", "A store in LanceDB")
        self.location = folder / "lancedb"
        self.writes = 0

    @cached_property
    def database(self) -> Any:
        """The connection, which makes the folder."""
        return self.lancedb.connect(str(self.location))

    @property
    def exists(self) -> bool:
        """Whether there is a table."""
        return (self.location / f"{TABLE}.lance").is_dir()

    @cached_property
    def table(self) -> Any:
        """The table, which exists."""
        return self.database.open_table(TABLE)

    def foreign(self) -> str | None:
        return self.location.name if self.location.exists() else super().foreign()

    def resume(self, shard_rows: int) -> None:
        """Remove the rows of a shard that a killed run did not complete."""
        if self.exists:
            complete = set(self.shards())
            begun = {int(n) for part in self.tables(["row"]) for n in np.unique(part["row"].to_numpy() // shard_rows)}
            for number in sorted(begun - complete):
                self.table.delete(f"row >= {number * shard_rows} AND row < {(number + 1) * shard_rows}")
        self.check_count(self.table.count_rows() if self.exists else 0, str(self.location), exactly=True)

    def insert(self, table: Any) -> None:
        if self.exists:
            self.table.add(table, on_bad_vectors=MISSING)
        else:
            self.database.create_table(TABLE, table, on_bad_vectors=MISSING)
        self.writes += 1
        if self.writes % TOGETHER == 0:
            self.table.optimize()

    def finish(self) -> None:
        """Put small files together, and remove those that they were before: the table would take twice its room."""
        if self.writes:
            self.table.optimize(cleanup_older_than=timedelta(milliseconds=1))  # 0 is warned about

    def sizes(self) -> dict[str, int]:
        return vector_columns(self.table.schema) if self.exists else {}

    def tables(self, columns: Sequence[str]) -> Iterator[Any]:
        import pyarrow

        if self.exists:
            for batch in self.table.search().select(list(columns)).to_batches():
                yield pyarrow.Table.from_batches([batch])

    def nearest(self, modality: str, query: np.ndarray, count: int) -> Any:
        """Compare every vector, whether the table has an index or not."""
        found = self.table.search(query, vector_column_name=modality).distance_type("dot").bypass_vector_index()
        found = found.where(f"`{modality}` IS NOT NULL", prefilter=True)
        return found.limit(count).to_arrow().select([*ABOUT, modality])
