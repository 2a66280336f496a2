"""Original state dicts to ours, and back, by a table of keys.

A row is `(source, target)` or `(source, target, change)`. In a source, `{}` stands for one name between separators
and `{...}` for any rest; the target repeats them in the same order. A tuple of targets takes the parts of a `split`.
Target None drops a key; a comment beside the row gives the reason. So does a target of (), whose change makes the
tensor again on the way back.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfvlm.checkpoints.saving import LazyTensors
from hfvlm.checks.messages import listed


class Change(NamedTuple):
    """What happens to a tensor on its way to our layout, and how to undo it."""

    apply: Callable[[Tensor], Any]
    undo: Callable[..., Tensor] | None = None


class Row(NamedTuple):
    """One row of a table. An `optional` row may meet no key."""

    source: str
    target: str | tuple[str, ...] | None
    change: Change | None = None
    optional: bool = False


def split(parts: int) -> Change:
    """Split one tensor that holds several, one after the other: fused query, key and value."""
    return Change(lambda tensor: tensor.chunk(parts), lambda *tensors: torch.cat(tensors))


def tied(parameters: int) -> Change:
    """Fill several parameters, which the model ties, with one tensor."""
    return Change(lambda tensor: (tensor,) * parameters, lambda first, *_: first)


def grouped(groups: int, parts: int) -> Change:
    """Do as `split`, of groups that hold a share of each part: Megatron puts a head's query, key and value
    together."""

    def together(*tensors: Tensor) -> Tensor:
        return torch.stack([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 2)

    def apart(tensor: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.flatten(0, 1) for part in tensor.unflatten(0, (groups, parts, -1)).unbind(1))

    return Change(apart, together)


def reshape(*shape: int) -> Change:
    return Change(lambda tensor: tensor.reshape(shape))


def permute(*axes: int) -> Change:
    return Change(lambda tensor: tensor.permute(axes), lambda tensor: tensor.permute(*_inverse(axes)))


def unstack(change: Change | None = None) -> Change:
    """Split a leading axis that holds the layers; each goes its own way after `change`."""
    return Change(lambda tensor: tuple(change.apply(part) if change else part for part in tensor.unbind()))


def _inverse(axes: tuple[int, ...]) -> list[int]:
    return [axes.index(i) for i in range(len(axes))]


transpose = permute(1, 0)
scalar = Change(lambda tensor: tensor.reshape(1), lambda tensor: tensor.reshape(()))
# Leading axes for a batch of one, and for one token of it.
unbatched = Change(lambda tensor: tensor.squeeze(0), lambda tensor: tensor.unsqueeze(0))
flat = Change(lambda tensor: tensor.flatten(), lambda tensor: tensor.reshape(1, 1, -1))


@dataclass
class KeyTableError(ValueError):
    """A table and a state dict that do not fit: every offender of every kind."""

    unknown: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unfilled: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    context: str = ""

    def __bool__(self) -> bool:
        return any((self.unknown, self.ambiguous, self.unused, self.unfilled, self.misshapen))

    def __str__(self) -> str:
        kinds = {
            "keys of the file without a row": self.unknown,
            "keys of the file with several rows": self.ambiguous,
            "rows without a key": self.unused,
            "parameters of the model left unfilled": self.unfilled,
            "tensors of the wrong shape": self.misshapen,
        }
        offenders = (f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names)
        return self.context + "; ".join(offenders)


@dataclass(frozen=True)
class Table:
    """One file's tensors and the rows that name where each goes; `name` tells the parts of a composed model apart."""

    tensors: Mapping[str, Tensor]
    rows: Iterable[tuple[Any, ...]]
    name: str = ""


def convert_keys(
    tensors: Mapping[str, Tensor], rows: Iterable[tuple[Any, ...]], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename and reshape every tensor, and account for each.

    Args:
        tensors: the original state dict; meta tensors will do.
        rows: the architecture's table.
        expected: the model's own state dict; only its keys and shapes are read.

    Raises:
        KeyTableError: unless every key meets exactly one row, every row meets a key, every parameter is filled, and
            all shapes fit.
    """
    return convert_tables([Table(tensors, rows)], expected)[0]


def convert_tables(tables: Iterable[Table], expected: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Do as `convert_keys`, for a model that is made of several files: what each of them contributes."""
    error = KeyTableError()
    parts = []
    for table in tables:
        part: dict[str, Tensor] = {}
        for key, row, names in _matches(table, error):
            part |= _targets(row, names, table.tensors[key], error)
        parts.append(part)
    whole: dict[str, Tensor] = {}
    for part in parts:
        error.ambiguous += [f"{key}, from several files" for key in part if key in whole]
        whole |= part
    counts = _counts(expected)
    _compare(counts | whole, expected, error)
    if error:
        raise error
    return [counts | parts[0], *parts[1:]]


def converted(tables: Iterable[Table], expected: Mapping[str, Tensor]) -> LazyTensors:
    """Return what `convert_tables` makes of tables that fit, each tensor read and rearranged when it is taken."""
    makers = LazyTensors.of(_counts(expected)).makers
    for table in tables:
        for key, row, names in _matches(table, KeyTableError()):
            for i, target in enumerate(_as_tuple(row.target)):
                makers[_fill(target, names)] = partial(_part, table.tensors, key, row.change, i)
    return LazyTensors(makers)


def _counts(expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make the counts of batches of batch norms; not every framework stores them, and nothing reads them."""
    return {key: torch.tensor(0) for key in expected if key.endswith(".num_batches_tracked")}


def _matches(table: Table, error: KeyTableError) -> Iterator[tuple[str, Row, tuple[str, ...]]]:
    """Yield each key with its row and the names that fill it."""
    rows = [Row(*row) for row in table.rows]
    patterns = [_pattern(row.source) for row in rows]
    prefix = f"{table.name}: " if table.name else ""
    unused = set(range(len(rows)))
    for key in table.tensors:
        hits = [(i, match) for i, pattern in enumerate(patterns) if (match := pattern.fullmatch(key))]
        unused -= {i for i, _ in hits}
        if len(hits) != 1:
            (error.ambiguous if hits else error.unknown).append(prefix + key)
            continue
        (i, match) = hits[0]
        yield key, rows[i], match.groups()
    error.unused += [prefix + rows[i].source for i in sorted(unused) if not rows[i].optional]


def _as_tuple(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return target if isinstance(target, tuple) else () if target is None else (target,)


def _part(tensors: Mapping[str, Tensor], key: str, change: Change | None, index: int) -> Tensor:
    parts = change.apply(tensors[key]) if change else tensors[key]
    return parts[index] if isinstance(parts, tuple) else parts


def _targets(row: Row, names: tuple[str, ...], tensor: Tensor, error: KeyTableError) -> dict[str, Tensor]:
    if row.target is None:
        return {}
    try:
        parts = row.change.apply(tensor) if row.change else tensor
    except RuntimeError:
        error.misshapen.append(f"{row.source} {tuple(tensor.shape)} cannot be rearranged")
        return {}
    targets = _as_tuple(row.target)
    parts = parts if isinstance(parts, tuple) else (parts,)
    if len(parts) != len(targets):
        error.misshapen.append(f"{row.source} {tuple(tensor.shape)} has {len(parts)} parts, expected {len(targets)}")
        return {}
    return {_fill(target, names): part for target, part in zip(targets, parts, strict=True)}


def _compare(converted: Mapping[str, Tensor], expected: Mapping[str, Tensor], error: KeyTableError) -> None:
    error.unfilled += [key for key in expected if key not in converted]
    for key, tensor in converted.items():
        if key not in expected:
            error.misshapen.append(f"{key} is no parameter of the model")
        elif tensor.shape != expected[key].shape:
            error.misshapen.append(f"{key} is {tuple(tensor.shape)}, expected {tuple(expected[key].shape)}")


def restore_keys(tensors: Mapping[str, Tensor], rows: Iterable[tuple[Any, ...]]) -> dict[str, Tensor]:
    """Restore the original's layout of our state dict: the table read from right to left.

    Raises:
        KeyTableError: the table has no way back for a tensor.
    """
    return dict(restored(tensors, rows))


def restored(tensors: Mapping[str, Tensor], rows: Iterable[tuple[Any, ...]]) -> LazyTensors:
    """Do as `restore_keys`, each tensor made when it is taken."""
    makers: dict[str, Callable[[], Tensor]] = {}
    error = KeyTableError()
    remaining = dict.fromkeys(tensors)
    for row in (Row(*row) for row in rows):
        if row.target is None or (row.change and row.change.undo is None):
            continue
        targets = _as_tuple(row.target)
        if not targets and row.change and row.change.undo:
            makers[row.source] = row.change.undo
            continue
        pattern = _pattern(targets[0])
        for names in [match.groups() for key in remaining if (match := pattern.fullmatch(key))]:
            keys = [_fill(target, names) for target in targets]
            # Of tensors that a model ties, a folder may hold the first alone.
            found = [key if key in remaining else None for key in keys]
            for key in keys:
                remaining.pop(key, None)
            makers[_fill(row.source, names)] = partial(_undone, tensors, found, row.change and row.change.undo)
    error.unknown = list(remaining)
    if error:
        raise error
    return LazyTensors(makers)


def _undone(tensors: Mapping[str, Tensor], keys: list[str | None], undo: Callable[..., Tensor] | None) -> Tensor:
    parts: list[Any] = [None if key is None else tensors[key] for key in keys]
    return undo(*parts) if undo else parts[0]


def fit(tensors: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> float:
    """Return the share of a file's keys that a table knows, for messages about files of another architecture."""
    keys = list(tensors)
    patterns = [_pattern(row[0]) for row in rows]
    return sum(any(pattern.fullmatch(key) for pattern in patterns) for key in keys) / max(len(keys), 1)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\.\.\.\}", "(.+)").replace(r"\{\}", "([^./]+)"))


def _fill(template: str, names: tuple[str, ...]) -> str:
    remaining = iter(names)
    return re.sub(r"\{(?:\.\.\.)?\}", lambda _: next(remaining), template)
