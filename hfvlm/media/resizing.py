"""Images to one size, as torchvision resizes PIL images, whose arithmetic the originals' pixels depend on."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

BICUBIC = Image.Resampling.BICUBIC
# A thin image grows long when its short edge is fitted; beyond this only the crop is computed.
MAX_RESIZED_PIXELS = 2**26


def squash(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """Resize to exactly (height, width), without regard to the aspect ratio."""
    return _resize(image, size, resample)


def squash_sampled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to exactly (height, width), bilinear between four pixels, fractions cut, as TensorFlow does uint8."""
    pixels = sampled(image, size).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def sampled(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Resize as `squash_sampled`, but keep fractions -> `(3, height, width)`, float32 in 0..255."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
    return interpolate(pixels, size=size, mode="bilinear", align_corners=False)[0].numpy()


def centre(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crop the centre of `(C, H, W)` -> `(C, height, width)`, of two the one nearer to the top left."""
    top, left = ((larger - smaller) // 2 for larger, smaller in zip(pixels.shape[1:], size, strict=True))
    return pixels[:, top : top + size[0], left : left + size[1]]


def cover(
    image: Image.Image, size: tuple[int, int], resample: int, crop: tuple[int, int] | None = None
) -> Image.Image:
    """Resize to the smallest size that covers (height, width), then crop the centre of that size, or of `crop`.

    A square target follows torchvision's `Resize(n)`, which cuts the fraction of the long edge; another follows
    open_clip's `ResizeKeepRatio`, which rounds and is always bicubic.
    """
    width, height = image.size
    if size[0] == size[1]:
        short, long = sorted((width, height))
        edge = int(size[0] * long / short)
        fitted = (edge, size[1]) if height > width else (size[0], edge)
    else:
        ratio = min(height / size[0], width / size[1])
        fitted, resample = (round(height / ratio), round(width / ratio)), BICUBIC
    if fitted[0] * fitted[1] > MAX_RESIZED_PIXELS:
        return _resize_centre(image, fitted, crop or size, resample)
    return crop_or_pad(_resize(image, fitted, resample), crop or size, fill=0)


def contain(image: Image.Image, size: tuple[int, int], resample: int, fill: Any) -> Image.Image:
    """Resize to the largest size that fits into (height, width), and pad to it around the centre."""
    width, height = image.size
    ratio = max(height / size[0], width / size[1])
    fitted = (max(1, round(height / ratio)), max(1, round(width / ratio)))
    return crop_or_pad(_resize(image, fitted, resample), size, fill)


def crop_or_pad(image: Image.Image, size: tuple[int, int], fill: Any) -> Image.Image:
    """Crop the centre of the image; where it is too small, pad it with `fill`, in the image's own mode."""
    width, height = image.size
    if height < size[0] or width < size[1]:
        canvas = Image.new(image.mode, (max(width, size[1]), max(height, size[0])), _fill(image, fill))
        if image.mode == "P":
            canvas.putpalette(image.getpalette() or ())
        canvas.paste(image, ((canvas.width - width) // 2, (canvas.height - height) // 2))
        image = canvas
    top, left = _offsets((image.height, image.width), size)
    return image.crop((left, top, left + size[1], top + size[0]))


def _resize_centre(image: Image.Image, fitted: tuple[int, int], size: tuple[int, int], resample: int) -> Image.Image:
    """Compute the centre crop of the image resized to `fitted`, without the rest of it."""
    top, left = _offsets(fitted, size)
    down, across = image.height / fitted[0], image.width / fitted[1]
    box = (left * across, top * down, (left + size[1]) * across, (top + size[0]) * down)
    return image.resize(size[::-1], resample, box=box)


def _offsets(larger: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the centre crop's top and left; halves are rounded to even, as Python's `round` does."""
    return round((larger[0] - size[0]) / 2), round((larger[1] - size[1]) / 2)


def _resize(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    return image if image.size == size[::-1] else image.resize(size[::-1], resample)


def _fill(image: Image.Image, fill: Any) -> Any:
    bands = len(image.getbands())
    return fill if bands == 1 or not isinstance(fill, int) else (fill,) * bands
