"""Frames as MERLOT Reserve takes them: fitted to a size at their top left.

Source: https://github.com/rowanz/merlot_reserve at d22c50f, pretrain/data_utils.py and mreserve/preprocess.py. Sizes
are computed in float32 and cut, as there.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hfvlm.media import MediaError
from hfvlm.media.resizing import MAX_RESIZED_PIXELS

# Width that a turned image gains on either side, and its grey.
EDGE, GREY = 4, 0.5
# Pixels of the short edge that a random scale leaves.
SHORTEST = 64.0


def turned(image: Tensor) -> Tensor:
    """Turn an upright image `(C, H, W)` in 0..1 to the left, with grey edges that say so; others stay."""
    if image.shape[1] < np.float32(4 * image.shape[2]) / np.float32(3):
        return image
    return F.pad(torch.rot90(image, 1, (1, 2)), (EDGE, EDGE), value=GREY)


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize `(C, H, W)` in 0..1 as TensorFlow does, bilinear over all pixels that a new one covers."""
    if size[0] * size[1] > MAX_RESIZED_PIXELS or min(size) < 1:
        raise MediaError(f"{image.shape[2]} x {image.shape[1]} pixels are too thin to be fitted: crop them.")
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)


def placed(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut `(C, H, W)` to (height, width), or put black below it and on its right."""
    image = image[:, : size[0], : size[1]]
    return F.pad(image, (0, size[1] - image.shape[2], 0, size[0] - image.shape[1]))


def fit_of(image: Tensor, size: tuple[int, int]) -> tuple[float, tuple[int, int]]:
    """Return what `(C, H, W)` is scaled by to fit into (height, width), and its size then."""
    height, width = (np.float32(edge) for edge in image.shape[1:])
    scale = min(np.float32(size[0]) / height, np.float32(size[1]) / width)
    return float(scale), (int(height * scale), int(width * scale))


def fitted(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize `(C, H, W)` to the largest size that fits into (height, width), also of small images, and put black below
    it and on its right."""
    return placed(resized(image, fit_of(image, size)[1]), size)


def random_fit_of(
    image: Tensor, size: tuple[int, int], limits: Sequence[float], draws: Sequence[float], *, covers: bool = False
) -> tuple[float, tuple[int, int], tuple[int, int]]:
    """Return what `fitted_at_random` scales an image by, its size then, and the top and left that it is cut at."""
    height, width = (np.float32(edge) for edge in image.shape[1:])
    low, high = (np.float32(limit) for limit in limits)
    factor = low + np.float32(draws[0]) * (high - low)
    if covers:
        factor = min(factor, max(np.float32(size[1]) / width, np.float32(size[0]) / height))
    wanted = [np.float32(int(factor * np.float32(edge))) for edge in size]
    scale = max(min(wanted[0] / height, wanted[1] / width), np.float32(SHORTEST) / min(height, width))
    fit = int(height * scale), int(width * scale)
    top, left = (
        int(np.float32(max(0, new - edge)) * np.float32(draw))
        for new, edge, draw in zip(fit, size, draws[1:], strict=True)
    )
    return float(scale), fit, (top, left)


def fitted_at_random(
    image: Tensor, size: tuple[int, int], limits: Sequence[float], draws: Sequence[float], *, covers: bool = False
) -> Tensor:
    """Do as `fitted` for a frame of training, larger or smaller by a random factor and cut at a random place.

    Args:
        image: `(C, H, W)` in 0..1.
        size: (height, width).
        limits: of the factor; 1.05 and 1.1 in pretraining, 1.0 and 1.1 in fine-tuning.
        draws: three numbers of 0..1, for the factor, the top and the left.
        covers: no larger than what covers the size.
    """
    _, fit, (top, left) = random_fit_of(image, size, limits, draws, covers=covers)
    return placed(resized(image, fit)[:, top:, left:], size)


def without_bars(frames: np.ndarray, threshold: int = 32, share: float = 0.2) -> tuple[int, int, int, int]:
    """Find black bars around all of a video's frames `(T, H, W, 3)` -> top, bottom, left, right of the rest.

    Args:
        frames: uint8.
        threshold: the lowest value of a channel that is not black.
        share: of height and width that is cut from each side at most.
    """
    seen = frames.max(axis=(0, -1)) >= threshold

    def limits(line: np.ndarray) -> tuple[int, int]:
        length, found = len(line), np.flatnonzero(line)
        first, last = (found[0], found[-1]) if len(found) else (length // 2, length // 2)
        return min(int(first), int(length * share)), max(int(last) + 1, int(length * (1 - share)))

    return *limits(seen.any(axis=1)), *limits(seen.any(axis=0))
