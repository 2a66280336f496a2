"""Arithmetic on embeddings, of any library and precision."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvlm.checks.ranges import check_number

MOST_NAMED = 5


def similarity(a: Any, b: Any) -> Any:
    """Return the cosines, `(N, M)`, of `(N, D)` and `(M, D)`; of single vectors likewise.

    They are computed in float32, whatever the embeddings' own precision, or in float64 where these have it.

    Raises:
        ValueError: the vectors are of different lengths, are zero or not finite, or are no `(D,)` or `(N, D)`.
    """
    left, right = alike(a, b)
    check_same_length([left, right])
    left, right = unit_rows(left), unit_rows(right)
    return left @ (right.T if right.ndim > 1 else right)


def combine(*vectors: Any, weights: Sequence[float] | None = None) -> Any:
    """Add in the embedding space: the weighted sum of vectors of unit length, of unit length again.

    Args:
        *vectors: `(D,)` or `(N, D)` each.
        weights: one for each, negative ones to take something away; by default 1.

    Raises:
        ValueError: there are more or fewer weights than vectors, a weight is not finite, the vectors do not go
            together, or the sum is zero.
    """
    weights = [1.0] * len(vectors) if weights is None else list(weights)
    if len(weights) != len(vectors) or not vectors:
        raise ValueError(f"combine() got {len(vectors)} vectors and {len(weights)} weights.")
    weights = [check_number(f"weight {i}", weight) for i, weight in enumerate(weights)]
    parts = alike(*vectors)
    check_same_length(parts)
    if len({len(part) for part in parts if part.ndim == 2} - {1}) > 1:
        raise ValueError(f"combine() got tables of different numbers of rows: {shapes(parts)}.")
    total = sum(weight * unit_rows(part) for weight, part in zip(weights, parts, strict=True))
    return unit_rows(total)


def unit_rows(vectors: Any) -> Any:
    """Scale arrays or tensors to unit length, float32 or float64.

    Raises:
        ValueError: a vector is zero or not finite; the message names its row.
    """
    (vectors,) = alike(vectors)
    # Scaled by the largest value first: squares of large or small float32 values leave its range.
    largest = absolute_largest(vectors)
    wrong = ~((largest > 0) & (largest < np.inf))
    if bool(wrong.any()):
        rows = [i for i, bad in enumerate(wrong.reshape(-1).tolist()) if bad]
        where = f"Row {', '.join(map(str, rows[:MOST_NAMED]))}" if vectors.ndim > 1 else "The vector"
        more = f" and {len(rows) - MOST_NAMED} more rows" if len(rows) > MOST_NAMED else ""
        raise ValueError(f"{where}{more}: a vector that is zero or not a number (NaN, infinity) has no direction.")
    scaled = vectors / largest[..., None]
    return scaled / ((scaled**2).sum(-1) ** 0.5)[..., None]


def absolute_largest(vectors: Any) -> Any:
    """Return the largest absolute value of each vector, NaN where there is one."""
    if vectors.shape[-1] == 0:
        raise ValueError(f"Vectors of no numbers, {tuple(vectors.shape)}, have no direction.")
    return vectors.abs().amax(-1) if isinstance(vectors, Tensor) else np.abs(vectors).max(-1)


def alike(*vectors: Any) -> list[Any]:
    """Convert vectors to tensors, if one of them is, or else to arrays, in float32 or, if one has it, float64.

    Raises:
        ValueError: they hold something other than real numbers.
    """
    if any(isinstance(vector, Tensor) for vector in vectors):
        device = next(vector.device for vector in vectors if isinstance(vector, Tensor))
        tensors = [v if isinstance(v, Tensor) else torch.from_numpy(as_array(v)) for v in vectors]
        if any(tensor.is_complex() for tensor in tensors):
            raise ValueError("Vectors are real numbers, not complex ones.")
        wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        return [tensor.to(device, wide) for tensor in tensors]
    arrays = [as_array(vector) for vector in vectors]
    kind = np.float64 if any(array.dtype == np.float64 for array in arrays) else np.float32
    return [array.astype(kind, copy=False) for array in arrays]


def as_array(vectors: Any) -> np.ndarray:
    """Convert arrays, lists and Arrow columns to an array of real numbers.

    Raises:
        ValueError: they are ragged, or hold something else.
    """
    if isinstance(vectors, Tensor):
        vectors = vectors.detach().cpu()
        vectors = vectors.float() if vectors.dtype == torch.bfloat16 else vectors
    if hasattr(vectors, "combine_chunks") or hasattr(vectors, "to_pylist"):
        vectors = vectors.to_pylist()
    try:
        array = np.asarray(vectors)
    except ValueError as error:
        raise ValueError("Vectors of different lengths make no table.") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"Vectors hold numbers, not {array.dtype}.")
    # Lists of Python's own numbers have no precision of their own.
    return array if isinstance(vectors, np.ndarray | Tensor) else array.astype(np.float32)


def check_same_length(vectors: Sequence[Any]) -> None:
    """Refuse what is no `(D,)` or `(N, D)` of one D.

    Raises:
        ValueError: a vector is of another shape.
    """
    if any(vector.ndim not in (1, 2) for vector in vectors) or len({vector.shape[-1] for vector in vectors}) > 1:
        raise ValueError(f"Vectors must be (D,) or (N, D) with one D, but got {shapes(vectors)}.")


def shapes(vectors: Sequence[Any]) -> str:
    """Describe the shapes of vectors."""
    return " and ".join(str(tuple(vector.shape)) for vector in vectors)
