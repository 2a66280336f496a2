"""Seeded augmentations of images: each takes an image and a `numpy.random.Generator`."""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np
from PIL import Image

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.media.resizing import crop_or_pad

TRIES = 10


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, resized to a square: CLIP's and OpenCLIP's only augmentation.

    Args:
        size: edge of the result in pixels.
        scale: share of the image's area, lowest and highest. OpenCLIP trains with 0.9 to 1.
        ratio: of width and height, lowest and highest.
        resample: Pillow's filter; 3 is bicubic.
        flip: probability of mirroring; captions with left or right do not go with it.
    """

    size: int
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resample: int = 3
    flip: float = 0.0

    def __post_init__(self) -> None:
        check_integer("size", self.size)
        check_number("flip", self.flip, 0, 1)
        check_integer("resample", self.resample, 0, 5)
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            check_number(f"{name}, highest,", high, 0, 1 if name == "scale" else None, open_low=True)
            check_number(f"{name}, lowest,", low, 0, high, open_low=True)

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        box = self.box(*image.size, random)
        part = image.convert("RGB").resize((self.size, self.size), Image.Resampling(self.resample), box=box)
        mirrored = self.flip > 0 and random.random() < self.flip
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else part

    def cut(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        """Crop the part, and do not resize it: for models that take it at several sizes."""
        return image.convert("RGB").crop(self.box(*image.size, random))

    def box(self, width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw a box (left, top, right, bottom) until it fits, or else take the largest one in the middle."""
        low, high = self.ratio
        for _ in range(TRIES):
            area = width * height * random.uniform(*self.scale)
            ratio = exp(random.uniform(log(low), log(high)))
            w, h = round(sqrt(area * ratio)), round(sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
                return left, top, left + w, top + h
        w, h = min(width, round(height * high)), min(height, round(width / low))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


@dataclass(frozen=True)
class RandomCropAndFlip:
    """A square of the resized image, mirrored half of the time: ALIGN's (346 pixels, of which 289 are cut out).

    Captions with left or right do not go with flipping.

    Args:
        size: edge of the result in pixels.
        resized: length of the image's shorter edge before the crop.
        flip: probability of mirroring.
        resample: Pillow's filter; 2 is bilinear.
    """

    size: int
    resized: int
    flip: float = 0.5
    resample: int = 2

    def __post_init__(self) -> None:
        for name in ("size", "resized"):
            check_integer(name, getattr(self, name))
        check_integer("resample", self.resample, 0, 5)
        check_number("flip", self.flip, 0, 1)
        if self.resized < self.size:
            raise ValueError(f"No crop of {self.size} pixels fits into {self.resized}.")

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        scale = self.resized / min(image.size)
        width, height = (max(self.resized, round(edge * scale)) for edge in image.size)
        left, top = int(random.integers(width - self.size + 1)), int(random.integers(height - self.size + 1))
        mirrored = random.random() < self.flip
        image = image.convert("RGB").resize((width, height), Image.Resampling(self.resample))
        image = image.crop((left, top, left + self.size, top + self.size))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


@dataclass(frozen=True)
class Framed:
    """An augmentation whose result gets a border, of which a processor that crops the centre of what it resized leaves
    nothing: it does not crop an image twice.

    Args:
        change: makes a square of the processor's size.
        resized: the edge that the processor resizes to.
    """

    change: Callable[[Image.Image, np.random.Generator], Image.Image]
    resized: int

    def __post_init__(self) -> None:
        check_integer("resized", self.resized)

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        return crop_or_pad(self.change(image, random), (self.resized, self.resized), 0)
