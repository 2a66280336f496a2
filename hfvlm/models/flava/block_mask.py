"""Which patches of an image are masked in pretraining."""

from dataclasses import dataclass
from math import exp, log, sqrt
from random import Random

import numpy as np

TRIES = 10


@dataclass(frozen=True)
class BlockMask:
    """Hides rectangles of patches until enough are hidden (BEiT, https://arxiv.org/abs/2106.08254, algorithm 1).

    Draws the numbers that the original draws, in its order.

    Args:
        rows: of patches.
        columns: of patches.
        total: patches to hide; it may end with fewer, never with more.
        least: smallest area that is drawn for a rectangle.
        most: largest, and the most patches that one rectangle may add; None for `total`.
        lowest_aspect: of height and width.
        highest_aspect: of height and width; None for the inverse of the lowest.
    """

    rows: int = 14
    columns: int = 14
    total: int = 75
    least: int = 16
    most: int | None = None
    lowest_aspect: float = 0.3
    highest_aspect: float | None = None

    def __call__(self, random: Random) -> np.ndarray:
        """(rows, columns) of int64, 1 for what is hidden."""
        mask = np.zeros((self.rows, self.columns), dtype=np.int64)
        most = self.total if self.most is None else self.most
        while (left := self.total - int(mask.sum())) > 0 and self.hide(mask, min(left, most), random):
            pass
        return mask

    def hide(self, mask: np.ndarray, room: int, random: Random) -> bool:
        """Hide one more rectangle, which adds at most `room` patches; whether one was found."""
        aspects = log(self.lowest_aspect), log(self.highest_aspect or 1 / self.lowest_aspect)
        for _ in range(TRIES):
            area, aspect = random.uniform(self.least, room), exp(random.uniform(*aspects))
            height, width = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            if height >= self.rows or width >= self.columns:
                continue
            top, left = random.randint(0, self.rows - height), random.randint(0, self.columns - width)
            block = mask[top : top + height, left : left + width]
            if 0 < block.size - block.sum() <= room:
                block[:] = 1
                return True
        return False
