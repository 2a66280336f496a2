"""A matrix of logits, a part at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Logits that are held at once, where whole rows are needed; larger blocks save no time.
BLOCK = 2**22
# The side of square blocks: on a CPU, what is done with one finds it in the core's cache.
CPU_SIDE, SIDE = 512, 4096
# Logits that are stored for the gradient; all others are computed again.
STORED = 2**22

Block = tuple[slice, slice, Tensor]


def row_blocks(a: Tensor, b: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Multiply `(B, D)` and `(M, D)` -> slices of the rows of `a`, each with its logits `(rows, M)`.

    The caller may change them; one buffer serves all blocks.
    """
    height = max(1, min(len(a), BLOCK // len(b)))
    buffer = a.new_empty(height, len(b))
    for rows in slices(len(a), height):
        part = buffer[: rows.stop - rows.start]
        yield rows, torch.mm(a[rows] * scale, b.t(), out=part)


def square_blocks(a: Tensor, b: Tensor, scale: Tensor, stored: dict[Any, Tensor] | None = None) -> Iterator[Block]:
    """Multiply `(B, D)` and `(M, D)` -> slices of the rows of `a` and of `b`, each two with their logits.

    With a dictionary as `stored`, the first blocks stay there, and a second pass finds them; only without it may the
    caller change them.
    """
    side = CPU_SIDE if a.device.type == "cpu" else SIDE
    scaled, columns_first = a * scale, b.t()
    for rows in slices(len(a), side):
        for columns in slices(len(b), side):
            corner = rows.start, columns.start
            logits = stored.get(corner) if stored else None
            if logits is None:
                logits = scaled[rows] @ columns_first[:, columns]
                if stored is not None and (len(stored) + 1) * side**2 <= STORED:
                    stored[corner] = logits
            yield rows, columns, logits


def slices(length: int, size: int) -> Iterator[slice]:
    """Split 0 ... length into parts."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


@contextmanager
def in_full_precision(like: Tensor) -> Iterator[torch.dtype]:
    """Compute in float32 or better: logits are scaled by up to 100 and exponentiated, and half precision would be off
    by tens of percent."""
    with torch.autocast(like.device.type, enabled=False):
        yield torch.promote_types(like.dtype, torch.float32)


def check_pairs(a: Tensor, b: Tensor) -> None:
    """Refuse embeddings of different shapes."""
    if a.shape != b.shape:
        raise ValueError(
            f"A contrastive loss compares row i with row i, but got {tuple(a.shape)} and {tuple(b.shape)}: pass as "
            "many texts as images, or leave return_loss out."
        )


def check_negatives(rows: int, processes: int, remedy: str = "Give batches of at least two.") -> None:
    """Refuse to learn from a single pair, which is compared with nothing.

    Raises:
        ValueError: there is one pair in the whole batch.
    """
    if rows * processes < 2:
        raise ValueError(
            "A contrastive loss compares a pair with others, and a batch of one pair has no negatives: its loss is 0 "
            f"and nothing is learnt. {remedy}"
        )
