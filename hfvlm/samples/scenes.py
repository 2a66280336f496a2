"""Rendered scenes of coloured shapes, with captions that say what is in them."""

from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 210, 40),
    "purple": (148, 60, 189),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.22, "large": 0.38}
TEMPLATES = (
    "a {size} {colour} {shape}",
    "a picture of a {size} {colour} {shape}",
    "a {shape}, {size} and {colour}",
    "{size} {colour} {shape} on a dark ground",
)


@dataclass(frozen=True)
class Scene:
    """One shape; its place is chance, and no caption tells it."""

    colour: str
    shape: str
    size: str

    def caption(self, template: str = TEMPLATES[0]) -> str:
        return template.format(colour=self.colour, shape=self.shape, size=self.size)

    def render(self, random: np.random.RandomState, pixels: int = 32) -> Image.Image:
        """A picture, drawn four times too large and scaled down for smooth edges."""
        edge = 4 * pixels
        image = Image.new("RGB", (edge, edge), tuple(int(v) for v in random.randint(0, 50, 3)))
        radius = SIZES[self.size] * edge * random.uniform(0.9, 1.1)
        x, y = random.uniform(radius, edge - radius, 2)
        colour = tuple(int(np.clip(v + random.randint(-15, 16), 0, 255)) for v in COLOURS[self.colour])
        _draw(ImageDraw.Draw(image), self.shape, (x, y), radius, colour)
        return image.resize((pixels, pixels), Image.Resampling.BICUBIC)


def all_scenes() -> list[Scene]:
    return [Scene(*parts) for parts in product(COLOURS, SHAPES, SIZES)]


PAIR_TEMPLATES = (
    "a {left} left of a {right}",
    "a {right} right of a {left}",
    "on the left a {left}, on the right a {right}",
    "a {left} and, to its right, a {right}",
)


@dataclass(frozen=True)
class ScenePair:
    """Two shapes side by side; which of them is on the left is half of what the caption says."""

    left: tuple[str, str]
    right: tuple[str, str]

    def caption(self, template: str = PAIR_TEMPLATES[0]) -> str:
        return template.format(left=" ".join(self.left), right=" ".join(self.right))

    def render(self, random: np.random.RandomState, pixels: int = 32) -> Image.Image:
        edge = 4 * pixels
        image = Image.new("RGB", (edge, edge), tuple(int(v) for v in random.randint(0, 50, 3)))
        draw = ImageDraw.Draw(image)
        for i, (colour, shape) in enumerate((self.left, self.right)):
            radius = edge * random.uniform(0.18, 0.23)
            x, y = edge * (0.26 + 0.48 * i), random.uniform(radius, edge - radius)
            _draw(draw, shape, (x, y), radius, COLOURS[colour])
        return image.resize((pixels, pixels), Image.Resampling.BICUBIC)


def all_pairs() -> list[ScenePair]:
    shapes = list(product(COLOURS, SHAPES))
    return [ScenePair(left, right) for left, right in product(shapes, shapes) if left != right]


def _draw(
    draw: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float, colour: tuple[int, ...]
) -> None:
    x, y = centre
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        half = radius * 0.9
        draw.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius * 0.8), (x + radius, y + radius * 0.8)], fill=colour)
    else:
        arm = radius * 0.3
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
