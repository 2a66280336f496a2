"""Boxes and masks in PaliGemma's texts: four <locYYYY>, then, of a mask, sixteen <segNNN>, then a name.

Boxes are top, left, bottom and right, as the authors have them, in steps of 1 / 1023 of the image.

Source: https://github.com/google-research/big_vision at 0127fb6, pp/proj/paligemma/segmentation.py and
evaluators/proj/paligemma/transfers/segmentation.py.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

STEPS, CODES, EDGE = 1023, 16, 64
LOCATIONS = tuple(f"<loc{i:04d}>" for i in range(STEPS + 1))
SEGMENTS = tuple(f"<seg{i:03d}>" for i in range(128))
PIECES = (*LOCATIONS, *SEGMENTS)
# Top, left, bottom and right as shares of the image.
Shares = Sequence[float]


class Match(NamedTuple):
    """A region in a text.

    Args:
        label: the name after it, None without one.
        box: top, left, bottom and right in steps of 1 / 1023.
        codes: of the mask, none without it.
    """

    label: str | None
    box: tuple[int, int, int, int]
    codes: tuple[int, ...]


PATTERN = re.compile(r"((?:<loc\d{4}>){4})((?:<seg\d{3}>)*)([^<;]*)")


def find(text: str) -> Iterator[Match]:
    """Find regions whose box has an area, and whose mask, if there is one, has all its codes."""
    for boxes, segments, name in PATTERN.findall(text):
        box = tuple(map(int, re.findall(r"\d+", boxes)))
        codes = tuple(map(int, re.findall(r"\d+", segments)))
        known = max(box) <= STEPS and len(codes) in (0, CODES) and all(code < len(SEGMENTS) for code in codes)
        if known and box[2] > box[0] and box[3] > box[1]:
            yield Match(name.strip() or None, box, codes)  # type: ignore[arg-type]


def format_box(box: Shares) -> str:
    """Format a box; halves of steps are rounded to even, and what is outside moves to the edge."""
    steps = np.clip(np.round(np.asarray(box, dtype=np.float32) * np.float32(STEPS)), 0, STEPS).astype(int)
    return "".join(LOCATIONS[step] for step in steps)


def format_mask(codes: Sequence[int] | Tensor) -> str:
    """Format the sixteen codes of a mask.

    Raises:
        ValueError: there are more or fewer, or one is out of range.
    """
    numbers = [int(code) for code in codes]
    if len(numbers) != CODES or not all(0 <= code < len(SEGMENTS) for code in numbers):
        raise ValueError(f"A mask has {CODES} codes below {len(SEGMENTS)}, not {numbers}.")
    return "".join(SEGMENTS[code] for code in numbers)


def pixel_box(box: Sequence[int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right in whole pixels of an image of `size`, its width and height; fractions are
    cut."""
    width, height = size
    top, left, bottom, right = (int(step / STEPS * edge) for step, edge in zip(box, (height, width) * 2, strict=True))
    return top, left, bottom, right


def crop_mask(mask: Any, box: Shares) -> Tensor:
    """Crop a mask to a box, and resize it -> `(64, 64)`, 0 outside and 1 inside.

    Args:
        mask: `(H, W)`, booleans or 8-bit values.
        box: top, left, bottom and right as shares; pixels are rounded in single precision, halves to even.

    Raises:
        ValueError: the box has no pixels.
    """
    height, width = np.asarray(mask).shape
    edges = np.asarray((height, width) * 2, dtype=np.float32) * np.asarray(box, dtype=np.float32)
    return shrunk(mask, [int(edge) for edge in np.round(edges)])


def shrunk(mask: Any, box: Sequence[int]) -> Tensor:
    """Do as `crop_mask`, of a box in pixels."""
    array = np.asarray(mask)
    array = array.astype(np.uint8) * 255 if array.dtype == bool else array
    top, left, bottom, right = box
    crop = torch.from_numpy(np.array(array[top:bottom, left:right], dtype=np.float32))
    if 0 in crop.shape:
        raise ValueError(f"The box {list(box)}, top, left, bottom and right in pixels, has none of the mask.")
    resized = interpolate(crop[None, None], size=(EDGE, EDGE), mode="bilinear", antialias=True, align_corners=False)
    return resized[0, 0] / 255


def paste_mask(mask: Tensor, box: Sequence[int], size: tuple[int, int]) -> np.ndarray | None:
    """Put a decoded mask into an image -> `(H, W)` booleans; None for a box that is thinner than a pixel.

    Args:
        mask: `(64, 64)`, positive inside.
        box: top, left, bottom and right in steps.
        size: width and height of the image.
    """
    top, left, bottom, right = pixel_box(box, size)
    if right <= left or bottom <= top:
        return None
    small = Image.fromarray(mask.detach().float().cpu().numpy())
    inside = np.asarray(small.resize((right - left, bottom - top), Image.Resampling.BILINEAR)) > 0
    whole = np.zeros(size[::-1], dtype=bool)
    whole[top:bottom, left:right] = inside
    return whole


def mask_overlap(found: np.ndarray | None, drawn: np.ndarray) -> float:
    """Compute the intersection of two masks over their union; no mask overlaps nothing."""
    if found is None:
        return 0.0
    shared = int((found & drawn).sum())
    return shared / max(int(found.sum()) + int(drawn.sum()) - shared, 1)
