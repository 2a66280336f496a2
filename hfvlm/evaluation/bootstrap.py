"""How sure a number is."""

from collections.abc import Callable

import numpy as np

DRAWS = 1000


def interval(
    statistic: Callable[[np.ndarray], float], rows: int, *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Between which values a statistic lies in `level` of the sets that are drawn, with replacement, from the rows.

    Args:
        statistic: row numbers -> the value.
        rows: how many there are.
        level: as 0.95.
        draws: how many sets are drawn.
        seed: of the drawing.
    """
    random = np.random.default_rng(seed)
    values = [statistic(random.integers(rows, size=rows)) for _ in range(draws)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
