"""Search among embeddings, with queries of any modality and sums of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from hfvlm.checks.ranges import check_number
from hfvlm.inference.embedder import Embedder, combine

# "snow::0.5" has half the weight of "snow".
SEPARATOR = "::"


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
