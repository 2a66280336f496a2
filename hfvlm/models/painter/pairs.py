"""Two pairs of a task as one example of training: augmentation, masks, weights of the loss (baaivision/Painter at
cfec845, data/pairdataset.py, data/pair_transforms.py, util/masking_generator.py).
"""

from dataclasses import dataclass
from math import exp, log, sqrt
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn import functional as F

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.models.flava.block_mask import BlockMask
from hfvlm.models.painter.modeling_painter import IMAGE_MEAN, IMAGE_STD

TRIES = 10
# Of the first crop and of the second, which is of both images, one above the other: width to height.
RATIO, TALL_RATIO = (3 / 4, 4 / 3), (0.3, 0.7)
# Tasks whose targets are colours that stand for something, which no other lies between, and those whose crops are
# fixed: where things are is part of the target.
NEAREST_TARGETS = ("semantic", "instances")
FIXED = ("instances", "keypoints")
# Values of targets, in 0..1, above which they are painted on.
BLACK, NO_DEPTH = 1e-5, 1e-4
# Values that must be painted for an example to count: three channels of 100 pixels.
LEAST_PAINTED = 300
# Of keypoints, the weight of what is painted.
FOREGROUND = 10.0


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Jitter(NamedTuple):
    """Changes of colours, by their factors, in an order: 0 brightness, 1 contrast, 2 saturation, 3 hue."""

    order: tuple[int, ...]
    brightness: float
    contrast: float
    saturation: float
    hue: float

    def __call__(self, image: Image.Image) -> Image.Image:
        """Change an image's colours, as Pillow and torchvision do."""
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        factors = (self.brightness, self.contrast, self.saturation)
        for kind in self.order:
            image = shifted(image, self.hue) if kind == 3 else kinds[kind](image).enhance(factors[kind])
        return image


class Draw(NamedTuple):
    """What is random about the augmentation of one pair."""

    box: Box
    jitter: Jitter | None = None
    flip: bool = False


def shifted(image: Image.Image, hue: float) -> Image.Image:
    """Turn all hues of an image by a share of the circle."""
    hues, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hues).astype(np.int64) + int(hue * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")


def draw_box(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], random: Any) -> Box:
    """Draw a part of an image until it fits, or else take the largest of its middle.

    Args:
        height: of the image.
        width: of the image.
        scale: share of its area, lowest and highest.
        ratio: of width to height, lowest and highest.
        random: a `numpy.random.Generator`.
    """
    for _ in range(TRIES):
        area, aspect = height * width * random.uniform(*scale), exp(random.uniform(log(ratio[0]), log(ratio[1])))
        w, h = round(sqrt(area * aspect)), round(sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w)
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


@dataclass(frozen=True)
class PairAugmentation:
    """What is done to an image and its target: the same crop and mirroring, and to the image a change of colours.

    Args:
        size: edge in pixels that both are resized to.
        scale: of the crop, lowest and highest share of the area.
        jitter: probability of a change of colours.
        flip: probability of mirroring.
        strengths: of brightness, contrast, saturation and hue.
    """

    size: int = 448
    scale: tuple[float, float] = (0.3, 1.0)
    jitter: float = 0.8
    flip: float = 0.5
    strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)

    def __post_init__(self) -> None:
        check_integer("size", self.size)
        for name in ("jitter", "flip"):
            check_number(name, getattr(self, name), 0, 1)
        check_number("scale, highest,", self.scale[1], 0, 1, open_low=True)
        check_number("scale, lowest,", self.scale[0], 0, self.scale[1], open_low=True)

    @classmethod
    def of_task(cls, task: str, size: int) -> "PairAugmentation":
        """Make the augmentation of a task: nearly none where where things are is part of the target."""
        return cls(size, (0.9999, 1.0), 0.0, 0.0) if task in FIXED else cls(size)

    def draw(self, height: int, width: int, random: Any) -> Draw:
        """Draw what is random, for an image of a size, by a `numpy.random.Generator`."""
        box = draw_box(height, width, self.scale, RATIO, random)
        jitter = None
        if random.random() < self.jitter:
            *others, hue = self.strengths
            brightness, contrast, saturation = (float(random.uniform(1 - by, 1 + by)) for by in others)
            order = tuple(int(kind) for kind in random.permutation(4))
            jitter = Jitter(order, brightness, contrast, saturation, float(random.uniform(-hue, hue)))
        return Draw(box, jitter, bool(random.random() < self.flip))

    def apply(
        self, image: Image.Image, target: Image.Image, draw: Draw, *, filters: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Augment an image and its target, RGB -> `(3, size, size)` each, normalised.

        Args:
            image: of any size.
            target: of the same size.
            draw: of `draw`.
            filters: Pillow's, of the image and of the target; 0 is nearest, 3 is bicubic.
        """
        if image.size != target.size:
            raise ValueError(f"An image of {image.size} and its target of {target.size} must have the same size.")
        top, left, height, width = draw.box
        parts = [each.crop((left, top, left + width, top + height)) for each in (image, target)]
        pair = [
            part.resize((self.size, self.size), Image.Resampling(resample))
            for part, resample in zip(parts, filters, strict=True)
        ]
        if draw.jitter is not None:
            pair[0] = draw.jitter(pair[0])
        if draw.flip:
            pair = [each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in pair]
        return normalised(pair[0]), normalised(pair[1])


def normalised(image: Image.Image) -> Tensor:
    """Turn an RGB image into `(3, H, W)`, normalised."""
    values = torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255
    mean, std = (values.new_tensor(each)[:, None, None] for each in (IMAGE_MEAN, IMAGE_STD))
    return (values - mean) / std


def filters_of(task: str) -> tuple[int, int]:
    """Return Pillow's filters of images and targets in training."""
    return 3, 0 if task in NEAREST_TARGETS else 3


def recrop(values: Tensor, box: Box, resample: int) -> Tensor:
    """Resize a part of both images, `(3, 2 * S, S)`, to their size; bicubic (3), which may leave the range of colours,
    or nearest (0)."""
    rule: dict[str, Any] = {"mode": "nearest"}
    if resample != 0:
        rule = {"mode": "bicubic", "antialias": True, "align_corners": False}
    part = values[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
    return F.interpolate(part, size=tuple(values.shape[1:]), **rule)[0]


@dataclass(frozen=True)
class PairMask(BlockMask):
    """Hides blocks of patches of both targets and, where no more block fits, single patches: always `total`.

    Args:
        half: probability of hiding the lower target instead, as at inference.
    """

    rows: int = 56
    columns: int = 28
    total: int = 784
    least: int = 16
    most: int | None = 392
    half: float = 0.1

    def __call__(self, random: Random, numbers: Any = None) -> np.ndarray:
        """Return `(rows, columns)` of int64, 1 for what is hidden.

        Args:
            random: of the blocks.
            numbers: of the single patches, with numpy's `choice`; by default one that `random` seeds.
        """
        mask = super().__call__(random)
        if missing := self.total - int(mask.sum()):
            numbers = np.random.default_rng(random.getrandbits(64)) if numbers is None else numbers
            rows, columns = (mask == 0).nonzero()
            chosen = numbers.choice(len(rows), missing, replace=False)
            mask[rows[chosen], columns[chosen]] = 1
        return mask

    def lower_half(self) -> np.ndarray:
        """Return the mask of inference."""
        mask = np.zeros((self.rows, self.columns), dtype=np.int64)
        mask[self.rows // 2 :] = 1
        return mask


def loss_weights(target: Tensor, task: str) -> Tensor:
    """Weigh the loss at each value of a normalised target `(3, 2 * S, S)`.

    Where a depth or a class is missing, which is black, it has none; of keypoints, what is painted has ten times the
    weight; and an example of keypoints or instances with next to nothing painted has none at all.
    """
    level = NO_DEPTH if task == "depth" else BLACK
    mean, std = (target.new_tensor(each)[:, None, None] for each in (IMAGE_MEAN, IMAGE_STD))
    floor = (torch.full_like(mean, level) - mean) / std
    weights, painted = torch.ones_like(target), target > floor
    if task in ("depth", "semantic"):
        weights[target < floor] = 0
    if task == "keypoints":
        weights[painted] = FOREGROUND
    if task in FIXED and painted.sum() < LEAST_PAINTED:
        weights.zero_()
    return weights
