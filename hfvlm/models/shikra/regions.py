"""Boxes and points in Shikra's texts.

Source: mllm/dataset/process_function/box_process_function.py and mllm/dataset/utils/transform.py of
https://github.com/shikras/shikra at ff79a4c.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Left, top, right and bottom, or x and y.
Coordinates = Sequence[float]


@dataclass(frozen=True)
class Square:
    """The square with an image of this width and height in its middle."""

    width: int
    height: int

    @property
    def side(self) -> int:
        return max(self.width, self.height)

    @property
    def start(self) -> tuple[int, int]:
        """Left and top of the image in the square."""
        return (self.side - self.width) // 2, (self.side - self.height) // 2

    def share(self, region: Coordinates) -> list[float]:
        """Turn pixels of the image into shares of the side, from 0 to 1; of boxes, as in training, to three digits."""
        shares = [max(0.0, min((value + self.start[i % 2]) / self.side, 1.0)) for i, value in enumerate(region)]
        return [round(value, 3) for value in shares] if len(shares) == 4 else shares

    def pixels(self, region: Coordinates) -> list[int]:
        """Turn shares back into pixels; those outside of the image move to its edge."""
        ends = (self.width, self.height)
        return [
            max(0, min(round(value * self.side - self.start[i % 2]), ends[i % 2])) for i, value in enumerate(region)
        ]


class Match(NamedTuple):
    """Boxes, or points, in a text at `[start:end]`, in shares of the square's side."""

    start: int
    end: int
    regions: list[list[float]]


@dataclass(frozen=True)
class Decimals:
    """`[0.123,0.456,0.789,0.900;...]`, and `[0.500,0.500]` for a point.

    Args:
        digits: after the point.
        brackets: the two around regions.
    """

    digits: int = 3
    brackets: str = "[]"

    def format(self, regions: Sequence[Coordinates]) -> str:
        inside = ";".join(",".join(f"{value:.{self.digits}f}" for value in region) for region in regions)
        return self.brackets[0] + inside + self.brackets[1]

    def find(self, text: str) -> Iterator[Match]:
        """Find regions of exactly this format: one digit before the point, no blanks, as many numbers as needed."""
        left, right = map(re.escape, (self.brackets[0], self.brackets[1]))
        number = r"\d(?:\.\d*)?"
        kinds = (rf"{number}(?:,{number}){{{count - 1}}}" for count in (4, 2))
        pattern = "|".join(f"{kind}(?:;{kind})*" for kind in kinds)
        for match in re.finditer(f"{left}({pattern}){right}", text, re.ASCII):
            regions = [[float(value) for value in region.split(",")] for region in match[1].split(";")]
            yield Match(*match.span(), regions)


@dataclass(frozen=True)
class Bins:
    """A token for each of `count` steps along the side, and tokens around and between regions: the paper's
    alternative, of which no checkpoint was released. Unlike the original, it finds the points that it formats."""

    count: int = 1001

    @property
    def tokens(self) -> list[str]:
        """Tokens that the vocabulary needs, in the order of their ids."""
        marks = [f"<{kind}_{part}>" for kind in "bp" for part in ("st", "sep", "ed")]
        return [*marks, *(f"<bin_{i}>" for i in range(self.count))]

    def format(self, regions: Sequence[Coordinates]) -> str:
        kind = "b" if len(regions[0]) == 4 else "p"
        bins = (" ".join(f"<bin_{round(value * (self.count - 1))}>" for value in region) for region in regions)
        return f"<{kind}_st>{f'<{kind}_sep>'.join(bins)}<{kind}_ed>"

    def find(self, text: str) -> Iterator[Match]:
        for match in re.finditer(r"<([bp])_st>(.*?)<\1_ed>", text, re.DOTALL):
            parts = re.sub(r"\s", "", match[2]).split(f"<{match[1]}_sep>")
            width = {"b": 4, "p": 2}[match[1]]
            if all(re.fullmatch(rf"(?:<bin_\d+>){{{width}}}", part) for part in parts):
                regions = [[int(i) / (self.count - 1) for i in re.findall(r"\d+", part)] for part in parts]
                yield Match(*match.span(), regions)
