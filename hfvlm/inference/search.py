"""Search among embeddings, with queries of any modality and sums of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.inference.embedder import Embedder, combine
from hfvlm.inference.stores import Store, matrix
from hfvlm.inference.vectors import as_array, unit_rows

# "snow::0.5" has half the weight of "snow".
SEPARATOR = "::"
# Rows besides the hits that a store is asked for, and the most by which its float32 products may be off, twice.
MORE, DOUBT = 16, 1e-5


def weighed(query: Any) -> tuple[Any, float]:
    """Split a query from its weight after `::`, by default 1; what is no text, as a file's bytes, has none.

    Raises:
        ValueError: the weight is no finite number.
    """
    if not isinstance(query, str):
        return query, 1.0
    source, separator, weight = query.rpartition(SEPARATOR)
    if not separator:
        return query, 1.0
    try:
        return source, check_number("a weight", float(weight))
    except ValueError as error:
        raise ValueError(f"{query!r}: {weight!r} is no weight; write source{SEPARATOR}number.") from error


def query_vector(
    embedder: Embedder,
    queries: Mapping[str, Sequence[Any]],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Embed queries and add them, weighted; `(D,)`, of unit length.

    Args:
        embedder: of the model of the vectors that are searched.
        queries: {"text": ["a beach", "people::-0.5"], "audio": ["rain.wav"]}; files also as bytes.
        options: of the processor, by modality: {"audio": {"sampling_rate": 16000}}.

    Raises:
        ValueError: there is no query, options of a modality without one, or the sum is zero.
    """
    parts = [(modality, *weighed(query)) for modality, given in queries.items() for query in given]
    if not parts:
        known = ", ".join(f"--{modality}" for modality in embedder.modalities)
        raise ValueError(f"Nothing to search for: give one of {known}.")
    if unused := [modality for modality in options or {} if modality not in queries]:
        raise ValueError(f"Options of {unused[0]}, but no query of it.")
    sources: list[dict[str, Any]] = [{modality: source} for modality, source, _ in parts]
    given = {modality: dict(values) for modality, values in (options or {}).items()}
    vectors = [embedder.encode(**source, options=given) for source in sources]
    return combine(*vectors, weights=[weight for _, _, weight in parts])


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    Args:
        id: of the row.
        score: the cosine with the query.
        path: of its media file, where it has one.
        caption: where texts were embedded.
    """

    id: str
    score: float
    path: str | None
    caption: str | None


def nearest_rows(store: Store, modality: str, query: Any, k: int) -> list[Hit]:
    """Find the rows that are nearest to a query, the nearest first; of equal ones the first row.

    Stores add in orders of their own: what they find is compared again, in float64, and more is asked for until what
    they left out cannot be among the hits.

    Raises:
        ValueError: k is no number of hits, or the query is of another length, zero or not finite.
    """
    check_integer("k", k)
    exact = unit_rows(as_array(query).astype(np.float64))
    if exact.shape != (size := store.sizes()[modality],):
        raise ValueError(f"{modality}: the folder has vectors of {size} numbers, not of {exact.shape[-1]}.")
    count = k + MORE
    while True:
        found = store.nearest(modality, exact.astype(np.float32), count)
        if not len(found):
            return []
        # Row by row: a product of matrices depends, in its last digits, on the number of rows.
        scores = (unit_rows(matrix(found[modality]).astype(np.float64)) * exact).sum(axis=1).astype(np.float32)
        order = np.lexsort((found["row"].to_numpy(), -scores))[:k]
        if len(found) < count or scores[order[-1]] - scores.min() > DOUBT:
            break
        count *= 4
    rows = found.take(order)
    about = [rows[name].to_pylist() if name in rows.column_names else [None] * k for name in ("id", "path", "caption")]
    return [Hit(name, float(scores[i]), *rest) for i, name, *rest in zip(order, *about, strict=False)]
