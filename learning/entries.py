"""The entries: one for each architecture, a function that trains a small model and tests it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Modules whose import registers entries.
MODULES = ("dual_encoders", "captioners", "chats", "others")


class Scores(NamedTuple):
    """What a measure gave for each test example, 0 to 1.

    Args:
        seeing: of the model.
        blind: of the baseline, on the same examples.
    """

    seeing: np.ndarray
    blind: np.ndarray


# Seed and effort, the share of the steps that are taken, and see `learning.fitting.count_of` -> scores by measure.
Run = Callable[[int, float], dict[str, Scores]]


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Args:
        name: of the architecture.
        purpose: what its paper is for, and what is learned here.
        blind: what the baseline is.
        run: trains and tests.
    """

    name: str
    purpose: str
    blind: str
    run: Run


_entries: dict[str, Entry] = {}


def learns(name: str, purpose: str, blind: str) -> Callable[[Run], Run]:
    """Register a function as the entry of an architecture."""

    def register(run: Run) -> Run:
        if name in _entries:
            raise ValueError(f"{name} has two entries.")
        _entries[name] = Entry(name, purpose, blind, run)
        return run

    return register


def entries() -> dict[str, Entry]:
    """Return all entries, by name."""
    for module in MODULES:
        importlib.import_module(f"learning.{module}")
    return dict(sorted(_entries.items()))
