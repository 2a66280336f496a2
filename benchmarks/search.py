"""Exact nearest neighbours: `Index` next to NumPy's product and FAISS.

python -m benchmarks.search [--quick] [--rounds 7] [--output search.json]
"""

from collections.abc import Iterator

import numpy as np

from benchmarks.measuring import Item, Row, Size
from benchmarks.report import main
from hfvlm import FaissIndex, Index

DIM = 512


def rows(size: Size) -> Iterator[Item]:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((size.pick(500, 100_000), DIM), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index, faiss = Index(vectors), FaissIndex(vectors)
    for count in (1, 32):
        for k in (10, 100):
            queries = generator.standard_normal((count, DIM), dtype=np.float32)
            queries /= np.linalg.norm(queries, axis=1, keepdims=True)
            ways = {
                "hfvlm": lambda q=queries, k=k: index.nearest(q, k)[1],
                "careful": lambda q=queries, k=k: by_hand(q, vectors, k),
                "faiss": lambda q=queries, k=k: faiss.nearest(q, k)[1],
            }
            yield Row(f"{count} queries, {k} of {len(vectors):,}", ways, tolerance=0.0)


def by_hand(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    scores = queries @ vectors.T
    best = np.argpartition(-scores, k, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1)


if __name__ == "__main__":
    main({"search": rows}, __doc__)
