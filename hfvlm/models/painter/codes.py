"""Targets as images: colours of classes, and depths as grey (baaivision/Painter at cfec845, data/ and eval/).

Colours count down from white in equal steps, the last channel first. Black means no class: no palette has it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvlm.checks.ranges import check_integer

# White is this depth.
FARTHEST = 10_000  # millimetres
DISTANCES = ("abs", "square", "mean")
# Pixels that are compared with a palette at a time.
PIXELS = 2**16
# Category ids of COCO's panoptic annotations, in the order of its colours: things, then stuff.
_NO_THINGS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_STUFF = (
    *(92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151, 154),
    *(155, 156, 159, 161, 166, 168, 171, *range(175, 179), 180, 181, *range(184, 201)),
)
COCO_IDS = (*(i for i in range(1, 91) if i not in _NO_THINGS), *_STUFF)
COCO_THINGS = 80


def stepped_colors(count: int, steps: int, channels: int = 3) -> np.ndarray:
    """Return `count` colours `(count, channels)` of `steps` levels a channel, uint8."""
    check_integer("count", count, 1, steps**channels)
    digits = np.unravel_index(np.arange(count), (steps,) * channels)
    return np.stack([255 - (256 // steps) * digit for digit in digits], axis=1).astype(np.uint8)


def class_colors(count: int = 150, steps: int | None = None) -> np.ndarray:
    """Return the colours of classes, `(count, 3)`, in as few `steps` a channel as there must be: ADE20k's 150 by
    default."""
    check_integer("count", count, 1, 2**20)
    return stepped_colors(count, int(count ** (1 / 3)) + 1 if steps is None else steps)


def coco_colors() -> np.ndarray:
    """Return the colours of COCO's 133 panoptic categories, `COCO_IDS`."""
    return stepped_colors(133, 7)


# By the names of their data sets.
PALETTES = {"ade20k": class_colors, "coco": coco_colors}


def palette_of(palette: Any) -> np.ndarray:
    """Return colours `(classes, 3)`: those of a data set in `PALETTES`, of a number of classes, or given ones.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(palette, str):
        if palette not in PALETTES:
            raise ValueError(f"palette {palette!r} is none of {', '.join(PALETTES)}; give colours, or how many.")
        return PALETTES[palette]()
    if isinstance(palette, int) and not isinstance(palette, bool):
        return class_colors(palette)
    colors = np.asarray(palette)
    if colors.ndim != 2 or colors.shape[1] != 3 or colors.min() < 0 or colors.max() > 255:
        raise ValueError(f"palette must be (classes, 3) colours of 0 to 255, not {colors.shape}.")
    return colors.astype(np.uint8)


def encode_classes(classes: Any, palette: Any = "ade20k") -> np.ndarray:
    """Paint a map of classes `(H, W)`, counted from 0 and -1 where there is none -> `(H, W, 3)`, uint8.

    Raises:
        ValueError: a class that the palette has no colour for.
    """
    classes, colors = np.asarray(classes), palette_of(palette)
    if classes.ndim != 2 or not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(f"A map of classes is (H, W) integers, not {classes.shape} of {classes.dtype}.")
    if classes.size and not -1 <= classes.min() <= classes.max() < len(colors):
        raise ValueError(
            f"Classes of {classes.min()} to {classes.max()}: the palette has {len(colors)}, from 0; -1 is none."
        )
    return np.concatenate([colors, np.zeros((1, 3), np.uint8)])[classes.astype(np.int64)]


def class_distances(image: Any, palette: Any = "ade20k", kind: str = "abs") -> Tensor:
    """Measure how far the colours of an image `(H, W, 3)` in 0..255 are from the palette's -> `(H, W, classes)`.

    Args:
        image: as painted.
        palette: see `palette_of`.
        kind: "abs" sums absolute differences over the channels, "square" their squares, "mean" the means of these two.
    """
    if kind not in DISTANCES:
        raise ValueError(f"kind {kind!r} is none of {', '.join(DISTANCES)}.")
    pixels = pixels_of(image).unsqueeze(2)
    delta = (pixels - torch.from_numpy(palette_of(palette)).float()).abs()
    if kind == "mean":
        delta = (delta + delta**2) / 2
    return (delta**2 if kind == "square" else delta).sum(dim=-1)


def decode_classes(image: Any, palette: Any = "ade20k", kind: str = "abs") -> np.ndarray:
    """Find the class whose colour is nearest: `(H, W, 3)` in 0..255 -> `(H, W)`, int64; see `class_distances`. Black
    becomes a class, too."""
    pixels, colors = pixels_of(image), palette_of(palette)
    rows = max(1, PIXELS // max(1, pixels.shape[1]))
    parts = [class_distances(part, colors, kind).argmin(dim=-1) for part in pixels.split(rows)]
    return torch.cat(parts).numpy()


def pixels_of(image: Any) -> Tensor:
    """Return an image, `(H, W, 3)` in 0..255, as floats.

    Raises:
        ValueError: it has another shape.
    """
    pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"A painted image is (H, W, 3), not {tuple(pixels.shape)}: convert it to RGB.")
    return pixels.float()


def encode_depth(depth: Any) -> np.ndarray:
    """Paint a depth map `(H, W)` in millimetres: grey, white from ten metres on -> `(H, W, 3)`, uint8."""
    depth = np.asarray(depth)
    if depth.ndim != 2 or not np.isfinite(depth).all():
        raise ValueError(f"A depth map is (H, W), finite, in millimetres, not {depth.shape}.")
    # float32, as Pillow holds it when it cuts off what follows the point.
    grey = (depth / float(FARTHEST) * 255).astype(np.float32).clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)
