"""Confidence intervals by bootstrap."""

from collections.abc import Callable

import numpy as np

from hfvlm.checks.ranges import check_integer, check_number

DRAWS = 1000


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
    check_integer("rows", rows)
    check_integer("draws", draws)
    check_integer("seed", seed, 0)
    check_number("level", level, 0, 1, open_low=True)
    random = np.random.default_rng(seed)
    values = [statistic(random.integers(rows, size=rows)) for _ in range(draws)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
