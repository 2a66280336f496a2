"""Which tiles v1.6 cuts a picture into, and how many tokens that makes.

Sizes are (height, width). Source: llava/mm_utils.py and llava/model/llava_arch.py of
https://github.com/haotian-liu/LLaVA at c121f04.
"""

from collections.abc import Iterable, Sequence
from math import ceil
from typing import NamedTuple

Size = tuple[int, int]


class Tiling(NamedTuple):
    """How a model reads pictures.

    Args:
        tile: edge in pixels of what the vision tower takes.
        patch: edge in pixels of its patches.
        pinpoints: sizes of which one is chosen for each picture, to cut it into tiles; None reads each picture once.
        merge: how the tiles' patches are joined; see `HfvlmLLaVAConfig.patch_merge`.
        class_token: each view has one token more.
    """

    tile: int
    patch: int
    pinpoints: Sequence[Sequence[int]] | None = None
    merge: str = "flat"
    class_token: bool = False

    @property
    def edge(self) -> int:
        """Patches along an edge of a view."""
        return self.tile // self.patch

    def tiles(self, image_size: Size) -> Size:
        """Rows and columns of the tiles of a picture."""
        if self.pinpoints is None:
            return 0, 0
        height, width = best_resolution(image_size, self.pinpoints)
        return height // self.tile, width // self.tile

    def count_tokens(self, image_size: Size | None = None) -> int:
        """Tokens of a picture of `image_size`, or of one view."""
        view = self.edge**2 + self.class_token
        if self.pinpoints is None or image_size is None:
            return view
        down, across = self.tiles(image_size)
        if self.merge != "spatial_unpad":
            return view * (1 + down * across)
        rows, columns = (
            part.stop - part.start for part in unpadded(image_size, (down * self.edge, across * self.edge))
        )
        return view + rows * (columns + 1)


def best_resolution(image_size: Size, pinpoints: Iterable[Sequence[int]]) -> Size:
    """The pinpoint that shows most of the picture's own pixels; among equals the smallest, then the first."""
    height, width = image_size

    def merit(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - pinpoint[0] * pinpoint[1]

    best = max(pinpoints, key=merit)
    return best[0], best[1]


def fitted(image_size: Size, target: Size) -> Size:
    """The size of the picture scaled to fit into `target`, the free edge rounded up."""
    height, width = image_size
    across, down = target[1] / width, target[0] / height
    if across < down:
        return min(ceil(height * across), target[0]), target[1]
    return target[0], min(ceil(width * down), target[1])


def unpadded(image_size: Size, grid: Size) -> tuple[slice, slice]:
    """Rows and columns of a grid of patches that show the picture; half of the rest is cut at each side."""
    (height, width), (rows, columns) = image_size, grid
    if width / height > columns / rows:
        edge = (rows - int(height * (columns / width))) // 2
        return slice(edge, rows - edge), slice(0, columns)
    edge = (columns - int(width * (rows / height))) // 2
    return slice(0, rows), slice(edge, columns - edge)
