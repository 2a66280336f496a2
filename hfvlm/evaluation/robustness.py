"""Effective robustness: accuracy on shifted data beyond what the accuracy on the original data lets expect.

Taori et al. 2020 (https://arxiv.org/abs/2007.00644): over many models, accuracies on both data sets lie on a line once
they are logits; what a model has above this line is its effective robustness.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite, log, tanh
from pathlib import Path

import numpy as np

from hfvlm.evaluation.bootstrap import joint_interval

# A line needs them; with few its slope is of little worth.
FEWEST = 2


@dataclass(frozen=True)
class Fit:
    """A line between logits of accuracies.

    Args:
        slope: of it.
        intercept: of it.
        models: the number of those that it is fitted to.
    """

    slope: float
    intercept: float
    models: int

    def expected(self, accuracy: float) -> float:
        """Return the accuracy on the shifted data that the line has for one on the original data, both 0 to 1."""
        if accuracy in (0.0, 1.0) and self.slope:  # whose logits are infinite
            return accuracy if self.slope > 0 else 1.0 - accuracy
        line = (self.slope * logit(accuracy) if self.slope else 0.0) + self.intercept
        return (1 + tanh(line / 2)) / 2  # the logistic function, of which no power overflows


@dataclass(frozen=True)
class Shift:
    """A model's accuracies on original and on shifted data.

    Args:
        name: of the shifted data.
        drop: the shifted accuracy less the original one, with the interval of both data sets' rows.
        robustness: the shifted accuracy less the expected one, likewise; None without a baseline.
        models: the number of those that the baseline is fitted to.
    """

    name: str
    drop: tuple[float, float, float]
    robustness: tuple[float, float, float] | None = None
    models: int = 0


def logit(accuracy: float) -> float:
    return log(accuracy / (1 - accuracy))


def fit_line(pairs: Sequence[tuple[float, float]]) -> Fit:
    """Fit a line, by least squares, to the logits of accuracies on original and shifted data.

    Args:
        pairs: one for each model of the baseline, above 0 and below 1.

    Raises:
        ValueError: there are fewer than two, or all have the same accuracy on the original data.
    """
    logits = np.array([[logit(a), logit(b)] for a, b in pairs]).reshape(-1, 2)
    if len(logits) < FEWEST or np.ptp(logits[:, 0]) == 0:
        raise ValueError(f"A baseline needs {FEWEST} models or more of different accuracies, not {len(pairs)}.")
    slope, intercept = np.polyfit(logits[:, 0], logits[:, 1], 1)
    return Fit(float(slope), float(intercept), len(pairs))


def read_baseline(path: str | Path, original: str, shifted: Sequence[str]) -> dict[str, Fit]:
    """Read the accuracies of a baseline's models, and fit a line for each shifted data set.

    Args:
        path: a CSV file with a column for each data set, by its name, and a row for each model; empty cells, and other
            columns, as of the models' names, are passed over.
        original: the name of the original data.
        shifted: the names of the others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks a column, or a cell is no accuracy above 0 and below 1; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such baseline.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    known = [name for name in (rows[0] if rows else ()) if name]
    for name in (original, *shifted):
        if name not in known:
            nearest = get_close_matches(name, known, 1, cutoff=0.0)
            hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
            raise ValueError(f"{path}: has no column {name!r}{hint}. Name the data as in --data {name}=FOLDER.")
    fits = {}
    for name in shifted:
        cells = [(number, row[original], row[name]) for number, row in enumerate(rows, start=2)]
        given = [(number, a, b) for number, a, b in cells if (a or "").strip() and (b or "").strip()]
        pairs = [(share(path, number, a), share(path, number, b)) for number, a, b in given]
        try:
            fits[name] = fit_line(pairs)
        except ValueError as error:
            raise ValueError(f"{path}, columns {original!r} and {name!r}: {error}") from error
    return fits


def share(path: Path, number: int, text: str) -> float:
    """Read an accuracy.

    Raises:
        ValueError: it is none; the message names the file and the line.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not isfinite(value) or not 0 < value < 1:
        raise ValueError(f"{path}, line {number}: an accuracy above 0 and below 1 is needed, not {text!r}.")
    return value


def measure_shift(name: str, original: np.ndarray, shifted: np.ndarray, fit: Fit | None = None) -> Shift:
    """Compare accuracies on original and shifted data.

    Args:
        name: of the shifted data.
        original: `(N,)`, 1 for each row that is right, else 0.
        shifted: `(M,)`, likewise.
        fit: of the baseline.
    """
    sizes = [len(original), len(shifted)]

    def drop(a: np.ndarray, b: np.ndarray) -> float:
        return float(shifted[b].mean() - original[a].mean())

    def beyond(a: np.ndarray, b: np.ndarray, fit: Fit) -> float:
        return float(shifted[b].mean()) - fit.expected(float(original[a].mean()))

    every = [np.arange(size) for size in sizes]
    plain = (drop(*every), *joint_interval(drop, sizes))
    if fit is None:
        return Shift(name, plain)
    low, high = joint_interval(lambda a, b: beyond(a, b, fit), sizes)
    return Shift(name, plain, (beyond(every[0], every[1], fit), low, high), fit.models)
