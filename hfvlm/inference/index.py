"""Nearest neighbours by cosine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hfvlm.checks.ranges import check_integer
from hfvlm.inference.vectors import as_array, unit_rows
from hfvlm.media.sources import import_extra
from hfvlm.writing import new_folder

# How many cosines are held at a time, and of how many queries: products of more gain nothing.
BLOCK, TOGETHER = 2**24, 256


class Index:
    """Exact search: every vector is compared, in blocks.

    Args:
        vectors: `(N, D)`, scaled to unit length here; None to begin empty.
        ids: N numbers or texts; by default the vectors' numbers.
    """

    backend = "exact"

    def __init__(self, vectors: Any = None, ids: Sequence[int | str] | None = None):
        self.vectors = np.empty((0, 0), np.float32)
        self.ids: list[int | str] = []
        if vectors is not None:
            self.add(vectors, ids)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, vectors: Any, ids: Sequence[int | str] | None = None) -> None:
        """Add `(N, D)` vectors.

        Raises:
            ValueError: they are of another length than earlier ones, are zero or not finite (the message names the
                row), or there are more or fewer ids than vectors.
        """
        rows = self.checked(vectors)
        ids = list(range(len(self), len(self) + len(rows))) if ids is None else list(ids)
        if len(ids) != len(rows):
            raise ValueError(f"{len(rows)} vectors need {len(rows)} ids, not {len(ids)}.")
        self.extend(rows)
        self.ids += ids

    def checked(self, vectors: Any) -> np.ndarray:
        """Scale vectors to unit length.

        Raises:
            ValueError: they are of another length than the index's, or are zero or not finite.
        """
        rows = as_array(vectors).astype(np.float32)
        if rows.ndim != 2 or (len(self) and rows.shape[1] != self.size):
            raise ValueError(f"An index of vectors of {self.size or 'any'} numbers got {rows.shape}.")
        return unit_rows(rows)

    @property
    def size(self) -> int:
        """Length of a vector; 0 while there is none."""
        return self.vectors.shape[1]

    def extend(self, rows: np.ndarray) -> None:
        """Add `(N, D)` vectors of unit length."""
        self.vectors = np.concatenate([self.vectors, rows]) if len(self) else rows

    def search(self, queries: Any, k: int = 10) -> list[Any]:
        """Find the nearest vectors, the nearest first; of equal ones, the one that was added first.

        Args:
            queries: `(D,)`, or `(N, D)`.
            k: number of hits.

        Returns:
            `[(id, cosine), ...]`, for `(N, D)` a list of such lists.

        Raises:
            ValueError: the queries are of another length than the vectors, or are zero or not finite; or k is no
                number of hits.
        """
        check_integer("k", k)
        queries = as_array(queries)
        rows = self.checked(queries[None] if queries.ndim == 1 else queries)
        scores, positions = self.nearest(rows, min(k, len(self)))
        found = [
            # FAISS has -1 as the position of what it did not find.
            [(self.ids[position], float(score)) for score, position in zip(*row, strict=True) if position >= 0]
            for row in zip(scores, positions, strict=True)
        ]
        return found[0] if queries.ndim == 1 else found

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the cosines and positions of the best vectors, best first; `(N, k)` each."""
        scores = np.empty((len(queries), 0), np.float32)
        positions = np.empty((len(queries), 0), np.int64)
        step = max(k, BLOCK // min(max(1, len(queries)), TOGETHER))
        for start in range(0, len(self), step):
            found, best = self.nearest_in(slice(start, start + step), queries, k)
            scores = np.concatenate([scores, found], axis=1)
            positions = np.concatenate([positions, start + best], axis=1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, positions = np.take_along_axis(scores, best, 1), np.take_along_axis(positions, best, 1)
        return scores, positions

    def nearest_in(self, block: slice, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the cosines and positions within a block of its best vectors, best first; `(N, k)` each."""
        vectors = self.vectors[block]
        step, parts = max(1, BLOCK // len(vectors)), []
        for start in range(0, max(1, len(queries)), step):
            cosines = queries[start : start + step] @ vectors.T
            best = highest(cosines, k)
            parts.append((np.take_along_axis(cosines, best, 1), best))
        scores, positions = (np.concatenate(rows) for rows in zip(*parts, strict=True))
        return scores, positions

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a folder that `load_index` reads; it appears when it is complete.

        Raises:
            FileExistsError: the folder exists already.
        """
        with new_folder(folder, overwrite=overwrite) as target:
            self.write(target)
            (target / "ids.json").write_text(json.dumps(self.ids) + "\n", encoding="utf-8")
            about = {"backend": self.backend, "count": len(self), "size": self.size}
            (target / "index.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
        return Path(folder)

    def write(self, folder: Path) -> None:
        """Write the vectors into a folder."""
        np.save(folder / "vectors.npy", np.ascontiguousarray(self.vectors))

    def read(self, folder: Path) -> None:
        """Read the vectors from a folder."""
        self.vectors = np.load(folder / "vectors.npy", mmap_mode="r")


def highest(scores: np.ndarray, k: int) -> np.ndarray:
    """Find the positions, `(N, k)`, of the highest of each row of `(N, M)`, best first; of equal ones the first."""
    k = min(k, scores.shape[1])
    values, found = (part.numpy() for part in torch.from_numpy(scores).topk(min(k + 1, scores.shape[1])))
    best = found[:, :k].copy()
    # top-k does not define the order of equal ones, nor which of them it leaves out.
    for i in np.flatnonzero((values[:, :-1] == values[:, 1:]).any(axis=1)):
        enough = np.flatnonzero(scores[i] >= values[i, k - 1])
        best[i] = enough[np.argsort(-scores[i, enough], kind="stable")[:k]]
    return best


class FaissIndex(Index):
    """Search by FAISS (`pip install 'hfvlm[faiss]'`).

    Args:
        vectors, ids: as for `Index`.
        factory: FAISS' description of an index, as "IVF1024,Flat", which the first vectors that are added train;
            "Flat" is exact.
    """

    backend = "faiss"

    def __init__(self, vectors: Any = None, ids: Sequence[int | str] | None = None, *, factory: str = "Flat"):
        self.faiss = import_backend("faiss")
        self.factory = factory
        self.index: Any = None
        super().__init__(vectors, ids)

    @property
    def size(self) -> int:
        return self.index.d if self.index is not None else 0

    def extend(self, rows: np.ndarray) -> None:
        if self.index is None:
            self.index = self.faiss.index_factory(rows.shape[1], self.factory, self.faiss.METRIC_INNER_PRODUCT)
            self.index.train(rows)
        self.index.add(rows)

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, positions = self.index.search(queries, k)
        # FAISS does not define which of equal scores comes first.
        order = np.lexsort((positions, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)

    def write(self, folder: Path) -> None:
        if self.index is not None:
            self.faiss.write_index(self.index, str(folder / "vectors.faiss"))

    def read(self, folder: Path) -> None:
        if (folder / "vectors.faiss").exists():
            self.index = self.faiss.read_index(str(folder / "vectors.faiss"))


class LanceIndex(Index):
    """Search in a LanceDB table (`pip install 'hfvlm[lancedb]'`), which is exact until an index is made in it."""

    backend = "lancedb"

    def __init__(self, vectors: Any = None, ids: Sequence[int | str] | None = None):
        self.lancedb = import_backend("lancedb")
        self.database = self.lancedb.connect("memory://")
        self.table: Any = None
        super().__init__(vectors, ids)

    @property
    def size(self) -> int:
        return self.table.schema.field("vector").type.list_size if self.table is not None else 0

    def extend(self, rows: np.ndarray) -> None:
        import pyarrow

        columns = {
            "place": pyarrow.array(np.arange(len(self), len(self) + len(rows))),
            "vector": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.ravel()), rows.shape[1]),
        }
        table = pyarrow.table(columns)
        if self.table is None:
            self.table = self.database.create_table("vectors", table)
        else:
            self.table.add(table)

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, positions = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for i, query in enumerate(queries):
            found = self.table.search(query).distance_type("cosine").limit(k).to_arrow()
            scores[i], positions[i] = 1 - found["_distance"].to_numpy(), found["place"].to_numpy()
        return scores, positions

    def write(self, folder: Path) -> None:
        if self.table is not None:
            self.lancedb.connect(str(folder / "lancedb")).create_table("vectors", self.table.to_arrow())

    def read(self, folder: Path) -> None:
        self.database = self.lancedb.connect(str(folder / "lancedb"))
        self.table = self.database.open_table("vectors")


BACKENDS: dict[str, type[Index]] = {kind.backend: kind for kind in (Index, FaissIndex, LanceIndex)}


def load_index(folder: str | Path) -> Index:
    """Load an index that `save` wrote; exact ones stay on disk, and only the rows that are compared are read.

    Raises:
        FileNotFoundError: the folder holds no index.
    """
    folder = Path(folder)
    if not (folder / "index.json").is_file():
        raise FileNotFoundError(f"{folder}: no index.json: this is no folder of an index.")
    about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    if about.get("backend") not in BACKENDS:
        raise ValueError(f"{folder}/index.json: backend {about.get('backend')!r} is none of {', '.join(BACKENDS)}.")
    index = BACKENDS[about["backend"]]()
    index.read(folder)
    index.ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
    if len(index.ids) != about["count"]:
        raise ValueError(f"{folder}: {len(index.ids)} ids for {about['count']} vectors.")
    return index


def import_backend(module: str) -> Any:
    """Import a library that is named as the extra which brings it."""
    return import_extra(module, module, "This index")
