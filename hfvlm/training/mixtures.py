"""Several data sets as one, of which each has a share."""

from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from hfvlm.checks.ranges import check_number
from hfvlm.media.sources import import_extra

MIXINGS = ("weights", "proportional", "round_robin")


class Mixture(Dataset[Any]):
    """Rows of several data sets, in an order that `datasets.interleave_datasets` draws, until every row of all was
    drawn. The rows of each come shuffled, and those of a smaller one again and again.

    Args:
        parts: the data sets; their columns need not be the same.
        weights: how many rows come of each, relative to the others; None takes one of each in turn.
        seed: of the order.
        views: of each data set what is done to a row.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        weights: Sequence[float] | None = None,
        *,
        seed: int = 0,
        views: Sequence[Callable[[Any], Any]] | None = None,
    ):
        datasets = import_extra("datasets", "train", "Mixing data sets")
        self.parts, self.views = list(parts), views
        shares = None if weights is None else (np.array(weights, float) / np.sum(weights)).tolist()
        # Indices alone: columns of different kinds, as one image and several, would not go into one table.
        numbers = [
            datasets.Dataset.from_dict({"part": np.full(len(part), i), "row": np.arange(len(part))}).shuffle(seed + i)
            for i, part in enumerate(self.parts)
        ]
        drawn = datasets.interleave_datasets(numbers, shares, seed=seed, stopping_strategy="all_exhausted")
        self.order = np.stack([np.array(drawn[name]) for name in ("part", "row")], axis=1)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        part, row = self.order[index].tolist()
        found = self.parts[part][row]
        return found if self.views is None else self.views[part](found)


def check_mixture(name: str, given: Any, mixing: str, fields: Collection[str]) -> None:
    """Check the field of a recipe that names one data set or several.

    Args:
        name: of the field.
        given: a path, or a list of {path: ..., weight: ...}.
        mixing: one of MIXINGS.
        fields: further ones of a data set.

    Raises:
        ValueError: naming the field and what it must be.
    """
    if mixing not in MIXINGS:
        raise ValueError(f"mixing {mixing!r} is none of {', '.join(MIXINGS)}.")
    if isinstance(given, str):
        return
    if not isinstance(given, list) or not given:
        raise ValueError(f"{name} needs a path, or a list of {{path: ..., weight: ...}}, not {given!r}.")
    for i, part in enumerate(given):
        if not isinstance(part, Mapping) or not isinstance(part.get("path"), str):
            raise ValueError(f"{name}: entry {i} needs a path, as in {{path: photos, weight: 1}}, not {part!r}.")
        check_part(name, part, mixing, ("path", "weight", *fields))


def check_part(name: str, part: Mapping[str, Any], mixing: str, fields: Collection[str]) -> None:
    """Check one data set of a mixture.

    Raises:
        ValueError: it has an unknown field, or a weight that it cannot have.
    """
    if unknown := sorted(set(part) - set(fields)):
        raise ValueError(f"{name}: {part['path']} has no field {unknown[0]!r}; there are {', '.join(fields)}.")
    if "weight" not in part:
        return
    check_number(f"{name}: weight of {part['path']}", part["weight"], 0, open_low=True)
    if mixing == "round_robin":
        raise ValueError(f"{name}: {part['path']} has a weight, and mixing round_robin takes all alike.")


def weights_of(parts: Sequence[Mapping[str, Any]], mixing: str, rows: Sequence[Sized]) -> list[float] | None:
    """Return the weight of each data set, by default 1, times its number of rows if shares are in proportion to that;
    None where they take turns."""
    if mixing == "round_robin":
        return None
    counts = [len(each) if mixing == "proportional" else 1 for each in rows]
    return [count * float(part.get("weight", 1)) for part, count in zip(parts, counts, strict=True)]
