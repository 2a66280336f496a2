"""A matrix of logits, some rows at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Logits held at once. Smaller blocks save little beside the embeddings, larger ones no time.
BLOCK = 2**22


def row_blocks(a: Tensor, b: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`(B, D)`, `(M, D)` -> slices of the rows of `a`, each with its logits `(rows, M)`, which the caller may change.

    One buffer serves all blocks.
    """
    height = max(1, min(len(a), BLOCK // len(b)))
    buffer = a.new_empty(height, len(b))
    for start in range(0, len(a), height):
        rows = slice(start, min(start + height, len(a)))
        part = buffer[: rows.stop - rows.start]
        yield rows, torch.mm(a[rows] * scale, b.t(), out=part)


@contextmanager
def in_full_precision(like: Tensor) -> Iterator[torch.dtype]:
    """Logits are scaled by up to 100 and exponentiated: half precision would be off by tens of percent."""
    with torch.autocast(like.device.type, enabled=False):
        yield torch.promote_types(like.dtype, torch.float32)


def check_pairs(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"A contrastive loss compares row i with row i, but got {tuple(a.shape)} and {tuple(b.shape)}: pass as "
            "many texts as images, or leave return_loss out."
        )
