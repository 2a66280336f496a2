"""Rows of token ids in which placeholders stand for the tokens of images or videos."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
# The label that no loss is computed of.
IGNORE = -100


class Row(NamedTuple):
    """A text with media, as a model takes it.

    Args:
        ids: with a placeholder for each token of each input.
        labels: the ids that are trained on, `IGNORE` elsewhere.
        media: images or videos, read, in the order of their placeholders.
        counts: placeholders of each input, also of those that were encoded before.
    """

    ids: list[int]
    labels: list[int]
    media: list[Any]
    counts: list[int]


def expand(values: Iterable[T], ids: Iterable[int], token: int, counts: Iterable[int]) -> list[T]:
    """Repeat the values at each `token` among the ids, by `counts` in their order."""
    remaining = iter(counts)
    pairs = zip(values, ids, strict=True)
    return [same for value, i in pairs for same in [value] * (next(remaining) if i == token else 1)]


def cut(row: Row, token: int, length: int, *, drop: bool, name: str) -> Row:
    """Keep the first `length` ids of a row, and never a part of an input.

    Args:
        row: with all its placeholders.
        token: the placeholder.
        length: in tokens.
        drop: leave out inputs that do not fit, and what follows them.
        name: of the row, for the message.

    Raises:
        ValueError: an input does not fit, and `drop` is off.
    """
    if len(row.ids) <= length:
        return row
    counts, ends, end = row.counts, [], 0
    for count in counts:
        end = row.ids.index(token, end) + count
        ends.append(end)
    fitting = sum(end <= length for end in ends)
    if fitting < len(counts):
        if not drop:
            raise ValueError(
                f"{name} has {len(row.ids)} tokens with its media, of {counts} tokens, and max_length {length} leaves "
                f"room for {fitting} of them: raise max_length, or pass truncation='pictures' to drop the others."
            )
        length = min(length, ends[fitting] - counts[fitting])
    return Row(row.ids[:length], row.labels[:length], row.media[:fitting], counts[:fitting])


def padded(rows: Sequence[Sequence[int]], length: int | None = None) -> list[list[int]]:
    """Labels with `IGNORE` behind each row, to `length` or that of the longest."""
    longest = max(map(len, rows)) if length is None else length
    return [[*row, *[IGNORE] * (longest - len(row))] for row in rows]
