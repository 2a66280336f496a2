"""Seeded distortions of an image by which two views of it differ (SimCLR, https://arxiv.org/abs/2002.05709,
appendix A)."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from hfvlm.checks.ranges import check_number
from hfvlm.training.augmentation import RandomResizedCrop


@dataclass(frozen=True)
class ColourDistortion:
    """Brightness, contrast, saturation and hue by chance, in any order, and sometimes no colours at all.

    Args:
        strength: 1 for ImageNet, 0.5 for CIFAR-10; brightness, contrast and saturation change by at most 0.8 of it,
            the hue by 0.2 of it, as a share of the circle.
        probability: of changing the colours.
        grey: probability of removing them.
    """

    strength: float = 1.0
    probability: float = 0.8
    grey: float = 0.2

    def __post_init__(self) -> None:
        check_number("strength", self.strength, 0)
        check_number("probability", self.probability, 0, 1)
        check_number("grey", self.grey, 0, 1)

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        image = image.convert("RGB")
        if random.random() < self.probability:
            most = 0.8 * self.strength
            kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, None)
            for i in random.permutation(len(kinds)):
                kind = kinds[i]
                if kind is None:
                    image = turn_hue(image, random.uniform(-0.2, 0.2) * self.strength)
                else:
                    image = kind(image).enhance(random.uniform(max(0.0, 1 - most), 1 + most))
        if random.random() < self.grey:
            image = image.convert("L").convert("RGB")
        return image


def turn_hue(image: Image.Image, share: float) -> Image.Image:
    """Turn the hue of every pixel by a share of the circle."""
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(level + round(256 * share)) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


@dataclass(frozen=True)
class SimCLRAugmentation:
    """A random part of the image, resized, mirrored half of the time, its colours distorted, and blurred half of the
    time: one view of it.

    Args:
        size: edge of the result in pixels.
        scale: share of the image's area, lowest and highest.
        colours: distorts the colours.
        blur: probability of blurring; the paper's CIFAR-10 has none.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    colours: ColourDistortion = field(default_factory=ColourDistortion)
    blur: float = 0.5

    def __post_init__(self) -> None:
        check_number("blur", self.blur, 0, 1)
        RandomResizedCrop(self.size, self.scale)

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        view = self.colours(RandomResizedCrop(self.size, self.scale, flip=0.5)(image, random), random)
        if random.random() < self.blur:
            view = view.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        return view
