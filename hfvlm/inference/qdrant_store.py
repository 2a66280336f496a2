"""Shards of vectors in a Qdrant collection, on a server or in a folder."""

import io
import os
import pickle
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hfvlm.inference.stores import ABOUT, DatabaseStore, schema_of, vector_columns
from hfvlm.media.sources import import_extra

# Numbers of the vectors that one request carries, about 12 bytes of JSON each; a server takes 32 MB.
AT_ONCE = 2**20
SECONDS = 300
KEY = "QDRANT_API_KEY"
# The classes of a point as the client's local mode stores it.
POINT = {("qdrant_client.http.models.models", "PointStruct"), ("builtins", "set")}


class QdrantStore(DatabaseStore):
    """Shards in a Qdrant collection (`pip install 'hfvlm[qdrant]'`): a point for each row, whose id is its number,
    with a named vector for each modality that it has.

    Args:
        folder, name: as of `Store`.
        url: of a server, whose key is in the environment variable QDRANT_API_KEY; None for the client's local mode, in
            the folder `qdrant` of the run's.
        collection: its name.
    """

    kind = "qdrant"

    def __init__(self, folder: Path, name: str, url: str | None, collection: str):
        super().__init__(folder, name)
        self.qdrant = import_extra("qdrant_client", "qdrant", "A store in Qdrant")
        self.url, self.collection = url, collection
        self.location = folder / "qdrant"
        self.where = f"{url}, collection {collection}" if url else str(self.location)

    @cached_property
    def client(self) -> Any:
        """The connection, which in local mode makes the folder and locks it."""
        if self.url:
            options = {"timeout": SECONDS, "check_compatibility": False}  # a thread's warning, whenever it comes
            return self.qdrant.QdrantClient(url=self.url, api_key=os.environ.get(KEY), **options)
        check_points(self.location)
        return self.qdrant.QdrantClient(path=str(self.location))

    def close(self) -> None:
        if "client" in self.__dict__:
            self.__dict__.pop("client").close()

    @property
    def exists(self) -> bool:
        """Whether there is a collection."""
        there = self.url is not None or self.location.is_dir()
        return there and self.client.collection_exists(self.collection)

    def foreign(self) -> str | None:
        if self.url is None:
            return self.location.name if self.location.exists() else super().foreign()
        return f"the collection {self.collection} at {self.url}" if self.exists else super().foreign()

    def resume(self, shard_rows: int) -> None:
        """Check the rows; those of a shard that a killed run did not complete are written again in their places."""
        found = self.client.count(self.collection, exact=True).count if self.exists else 0
        self.check_count(found, self.where, exactly=False)

    def insert(self, table: Any) -> None:
        models = self.qdrant.models
        sizes = vector_columns(table.schema)
        if not self.exists:
            # Vectors are of unit length: the product is the cosine. For its own, Qdrant would scale them again.
            vectors = {n: models.VectorParams(size=size, distance=models.Distance.DOT) for n, size in sizes.items()}
            self.client.create_collection(self.collection, vectors_config=vectors)
        step = max(1, AT_ONCE // sum(sizes.values()))
        for start in range(0, table.num_rows, step):
            points = [
                models.PointStruct(
                    id=row["row"],
                    vector={name: row[name] for name in sizes if row[name] is not None},
                    payload={name: row[name] for name in ABOUT[1:]},
                )
                for row in table.slice(start, step).to_pylist()
            ]
            self.client.upsert(self.collection, points=points, wait=True)

    def sizes(self) -> dict[str, int]:
        if not self.exists:
            return {}
        vectors = self.client.get_collection(self.collection).config.params.vectors
        return {name: about.size for name, about in vectors.items()}

    def tables(self, columns: Sequence[str]) -> Iterator[Any]:
        sizes = self.sizes()
        if not sizes:
            return
        wanted = [name for name in columns if name in sizes]
        step = max(1, AT_ONCE // (sum(sizes[name] for name in wanted) or 1024))
        offset = None
        while True:
            points, offset = self.client.scroll(self.collection, limit=step, offset=offset, with_vectors=wanted)
            yield self.as_table(points, {name: sizes[name] for name in wanted}).select(list(columns))
            if offset is None:
                return

    def nearest(self, modality: str, query: np.ndarray, count: int) -> Any:
        """Compare every vector, whether the collection has an index or not."""
        found = self.client.query_points(
            self.collection, query=query.tolist(), using=modality, limit=count, with_vectors=[modality],
            # Local mode has no index, and warns if one asks for none.
            search_params=self.qdrant.models.SearchParams(exact=True) if self.url else None,
        )  # fmt: skip
        return self.as_table(found.points, {modality: len(query)})

    @staticmethod
    def as_table(points: Sequence[Any], sizes: dict[str, int]) -> Any:
        """Return points as a pyarrow table of ABOUT and of vectors of these lengths, by modality."""
        import pyarrow

        rows = [
            {"row": point.id, **{name: (point.payload or {}).get(name) for name in ABOUT[1:]}}
            | {name: (point.vector or {}).get(name) for name in sizes}
            for point in points
        ]
        return pyarrow.Table.from_pylist(rows, schema_of(sizes))


class _PointsOnly(pickle.Unpickler):
    """Refuse every name but those of a point."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in POINT:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check_points(folder: Path) -> None:
    """Read the points that the client's local mode stored, which it unpickles: whoever made the folder could run code.

    Raises:
        ValueError: something in them is no point.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or "dbm" in path.suffix:
            raise ValueError(f"{path}: is nothing that Qdrant's local mode writes: embed again.")
        if path.suffix == ".sqlite":
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as opened:
                for _, content in opened.execute("SELECT id, point FROM points"):
                    try:
                        _PointsOnly(io.BytesIO(content)).load()
                    except Exception as error:
                        raise ValueError(f"{path}: holds what is no point ({error}): embed again.") from error
