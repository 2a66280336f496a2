"""Confidence intervals by bootstrap."""

from collections.abc import Callable, Sequence

import numpy as np

from hfvlm.checks.ranges import check_integer, check_number

DRAWS = 1000
# Row numbers that are drawn at a time.
BLOCK = 2**22


def interval(
    statistic: Callable[[np.ndarray], float], rows: int, *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Return the bounds between which a statistic lies in `level` of the sets that are drawn, with replacement, from
    the rows.

    Args:
        statistic: row numbers -> the value.
        rows: their number.
        level: as 0.95.
        draws: number of sets that are drawn.
        seed: of the drawing.

    Raises:
        ValueError: there are no rows, or a number is out of its range.
    """
    return joint_interval(statistic, [rows], level=level, draws=draws, seed=seed)


def joint_interval(
    statistic: Callable[..., float], sizes: Sequence[int], *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Return the bounds of a statistic of several sets, as two data sets, from each of which rows are drawn.

    Args:
        statistic: row numbers of each set -> the value.
        sizes: the numbers of rows of the sets.
        level: as in `interval`.
        draws: likewise.
        seed: likewise.

    Raises:
        ValueError: a set has no rows, or a number is out of its range.
    """
    for rows in sizes:
        check_integer("rows", rows)
    check_integer("draws", draws)
    check_integer("seed", seed, 0)
    check_number("level", level, 0, 1, open_low=True)
    random = np.random.default_rng(seed)
    values = [statistic(*(random.integers(rows, size=rows) for rows in sizes)) for _ in range(draws)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(
    values: np.ndarray, *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of a mean, as `interval` does, many sets at a time.

    Args:
        values: `(N,)`.
        level: as in `interval`.
        draws: likewise.
        seed: likewise.

    Raises:
        ValueError: there are no values, or a number is out of its range.
    """
    rows = check_integer("rows", len(values))
    check_integer("draws", draws)
    check_integer("seed", seed, 0)
    check_number("level", level, 0, 1, open_low=True)
    random, step = np.random.default_rng(seed), max(1, BLOCK // rows)
    sizes = [min(step, draws - start) for start in range(0, draws, step)]
    means = np.concatenate([values[random.integers(rows, size=(size, rows))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def ratio(sums: np.ndarray) -> float:
    """Return the ratio of the sums of `(N, 2)`, numerators and denominators; 0 where the denominators are 0."""
    top, bottom = sums.sum(axis=0)
    return float(top / bottom) if bottom else 0.0
