"""Near duplicates: copies within a training set, and test rows that were trained on."""

import torch
from torch import Tensor

from hfvlm.checks.ranges import check_number

BLOCK = 2**24


def near_duplicates(embeds: Tensor, threshold: float = 0.95, of: Tensor | None = None) -> Tensor:
    """Find, for each row, the first row that it repeats, or -1.

    The rows with -1 are the first of every group of equals.

    Args:
        embeds: `(N, D)`, of unit length, as a model's image embeddings.
        threshold: the cosine from which on two rows count as the same; 1 minus a rounding error finds exact copies.
        of: `(M, D)`, other rows to look for, as a test set's; by default the rows before each row itself.

    Returns:
        `(N,)`, indices into `of` or into `embeds`.

    Raises:
        ValueError: the threshold is no cosine, the vectors are of different lengths, or one is not finite.
    """
    check_number("threshold", threshold, -1, 1)
    for name, vectors in (("embeds", embeds), ("of", embeds if of is None else of)):
        if vectors.ndim != 2 or vectors.shape[1] != embeds.shape[1]:
            raise ValueError(f"{name} must be (N, D) with the D of embeds, not {tuple(vectors.shape)}.")
        if not bool(vectors.isfinite().all()):
            raise ValueError(f"{name}: row {int((~vectors.isfinite().all(dim=1)).nonzero()[0])} is not finite.")
    others = embeds if of is None else of
    found = torch.full((len(embeds),), -1, dtype=torch.long, device=embeds.device)
    rows = max(1, BLOCK // max(1, len(others)))
    for start in range(0, len(embeds), rows):
        block = embeds[start : start + rows]
        same = block @ others.t() >= threshold
        if of is None:
            same = same.tril(start - 1)  # a row does not repeat itself, nor what comes after it
        found[start : start + rows] = torch.where(same.any(dim=1), same.int().argmax(dim=1), -1)
    return found
