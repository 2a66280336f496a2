"""Which tiles v1.6 cuts an image into, and how many tokens that makes.

Sizes are (height, width). Source: llava/mm_utils.py and llava/model/llava_arch.py of
https://github.com/haotian-liu/LLaVA at c121f04.
"""

from collections.abc import Iterable, Sequence
from math import ceil
from typing import NamedTuple

Size = tuple[int, int]


class Tiling(NamedTuple):
    """How a model divides images.

    Args:
        tile: edge in pixels of the vision tower's input.
        patch: edge in pixels of its patches.
        pinpoints: sizes of which one is chosen for each image, to cut it into tiles; without any, images are not cut.
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

    @property
    def view(self) -> int:
        """Tokens of a view."""
        return self.edge**2 + self.class_token

    def tiles(self, image_size: Size) -> Size:
        """Count rows and columns of the tiles of an image."""
        if self.pinpoints is None:
            return 0, 0
        height, width = best_resolution(image_size, self.pinpoints)
        return height // self.tile, width // self.tile

    def count_tokens(self, image_size: Size | None = None) -> int:
        """Count the tokens of an image of `image_size`, or of one view."""
        if self.pinpoints is None or image_size is None:
            return self.view
        return self.view + COUNTS[self.merge](self, image_size)


def count_views(tiling: Tiling, image_size: Size) -> int:
    """Count the tokens of all tiles of an image."""
    down, across = tiling.tiles(image_size)
    return tiling.view * down * across


def count_unpadded(tiling: Tiling, image_size: Size) -> int:
    """Count the tokens of the tiles that show the image, and one at the end of each row."""
    down, across = tiling.tiles(image_size)
    rows, columns = (
        part.stop - part.start for part in unpadded(image_size, (down * tiling.edge, across * tiling.edge))
    )
    return rows * (columns + 1)


# By `HfvlmLLaVAConfig.patch_merge`; the model's projectors, which join the tiles, have the same names.
COUNTS = {"flat": count_views, "spatial": count_views, "spatial_unpad": count_unpadded}


def best_resolution(image_size: Size, pinpoints: Iterable[Sequence[int]]) -> Size:
    """Return the pinpoint that shows most of the image's own pixels; among equals the smallest, then the first."""
    height, width = image_size

    def merit(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - pinpoint[0] * pinpoint[1]

    best = max(pinpoints, key=merit)
    return best[0], best[1]


def fitted(image_size: Size, target: Size) -> Size:
    """Return the size of the image scaled to fit into `target`, the free edge rounded up."""
    height, width = image_size
    across, down = target[1] / width, target[0] / height
    if across < down:
        return min(ceil(height * across), target[0]), target[1]
    return target[0], min(ceil(width * down), target[1])


def unpadded(image_size: Size, grid: Size) -> tuple[slice, slice]:
    """Return the rows and columns of a grid of patches that show the image; half of the rest is cut at each side."""
    (height, width), (rows, columns) = image_size, grid
    if width / height > columns / rows:
        edge = (rows - int(height * (columns / width))) // 2
        return slice(edge, rows - edge), slice(0, columns)
    edge = (columns - int(width * (rows / height))) // 2
    return slice(0, rows), slice(edge, columns - edge)
