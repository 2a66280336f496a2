"""Rendered scenes of coloured shapes, with captions."""

import re
from collections.abc import Sequence
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
# Images are drawn at this multiple of their size, and scaled down for smooth edges.
SCALE = 4
# A shape to draw: its name, its centre, its radius and its colour.
Shape = tuple[str, tuple[float, float], float, tuple[int, ...]]
# The small models that ship were trained on these.
TEMPLATES = (
    "a {size} {colour} {shape}",
    "a picture of a {size} {colour} {shape}",
    "a {shape}, {size} and {colour}",
    "{size} {colour} {shape} on a dark ground",
)


@dataclass(frozen=True)
class Scene:
    """One shape, at a random position that no caption describes."""

    colour: str
    shape: str
    size: str

    def caption(self, template: str = TEMPLATES[0]) -> str:
        """Describe the shape."""
        return template.format(colour=self.colour, shape=self.shape, size=self.size)

    def render(self, random: np.random.RandomState | None = None, pixels: int = 32) -> Image.Image:
        """Draw an image; without `random`, the same."""
        random = random or np.random.RandomState(0)
        image, edge = _ground(random, pixels)
        radius = SIZES[self.size] * edge * random.uniform(0.9, 1.1)
        x, y = random.uniform(radius, edge - radius, 2)
        colour = tuple(int(np.clip(v + random.randint(-15, 16), 0, 255)) for v in COLOURS[self.colour])
        return _drawn(image, [(self.shape, (x, y), radius, colour)])


def all_scenes() -> list[Scene]:
    """List every scene."""
    return [Scene(*parts) for parts in product(COLOURS, SHAPES, SIZES)]


PAIR_TEMPLATES = (
    "a {left} left of a {right}",
    "a {right} right of a {left}",
    "on the left a {left}, on the right a {right}",
    "a {left} and, to its right, a {right}",
)


@dataclass(frozen=True)
class ScenePair:
    """Two shapes side by side; the caption describes which of them is on the left."""

    left: tuple[str, str]
    right: tuple[str, str]

    def caption(self, template: str = PAIR_TEMPLATES[0]) -> str:
        """Describe the shapes."""
        return template.format(left=" ".join(self.left), right=" ".join(self.right))

    def render(self, random: np.random.RandomState, pixels: int = 32) -> Image.Image:
        """Draw an image."""
        image, edge = _ground(random, pixels)
        shapes: list[Shape] = []
        for i, (colour, shape) in enumerate((self.left, self.right)):
            radius = edge * random.uniform(0.18, 0.23)
            x, y = edge * (0.26 + 0.48 * i), random.uniform(radius, edge - radius)
            shapes.append((shape, (x, y), radius, COLOURS[colour]))
        return _drawn(image, shapes)


def all_pairs() -> list[ScenePair]:
    """List every pair of different shapes."""
    shapes = list(product(COLOURS, SHAPES))
    return [ScenePair(left, right) for left, right in product(shapes, shapes) if left != right]


# The centres of the four quarters of an image, as shares of its width and height.
PLACES = {
    "northwest": (0.26, 0.26),
    "northeast": (0.74, 0.26),
    "southwest": (0.26, 0.74),
    "southeast": (0.74, 0.74),
}
NUMBERS = ("no", "one", "two", "three", "four")


@dataclass(frozen=True)
class SceneGroup:
    """One to four equal shapes, each in a quarter of its own."""

    colour: str
    shape: str
    places: tuple[str, ...]

    def caption(self) -> str:
        """Describe the shapes and their quarters."""
        number, ending = NUMBERS[len(self.places)], "s"[: len(self.places) - 1]
        places = ", ".join(place for place in PLACES if place in self.places)
        return f"{number} {self.colour} {self.shape}{ending} in the {places}"

    def questions(self) -> dict[str, tuple[str, str]]:
        """Return questions with their answers; the position's only for a single shape."""
        number = NUMBERS[len(self.places)]
        questions = {"colour": ("What colour is there?", self.colour), "count": ("How many are there?", number)}
        return questions | ({"position": ("Where is it?", self.places[0])} if len(self.places) == 1 else {})

    def render(self, random: np.random.RandomState, pixels: int = 32) -> Image.Image:
        """Draw an image."""
        return _in_quarters([(self.colour, self.shape)] * len(self.places), self.places, random, pixels)


@dataclass(frozen=True)
class ObjectScene:
    """One to four shapes, no two of one colour and shape, each in a quarter of its own."""

    # Colour and shape of what is in each of `places`.
    objects: tuple[tuple[str, str], ...]
    places: tuple[str, ...]

    def caption(self) -> str:
        """Name the shapes, those in the north first, and those in the west before those in the east."""
        order = sorted(range(len(self.places)), key=lambda i: list(PLACES).index(self.places[i]))
        return caption_of([self.objects[i] for i in order])

    def render(self, random: np.random.RandomState, pixels: int = 32) -> Image.Image:
        """Draw an image."""
        return _in_quarters(self.objects, self.places, random, pixels)


def caption_of(objects: Sequence[tuple[str, str]]) -> str:
    """Name shapes of these colours and names, in their order."""
    return " and ".join(f"a {colour} {shape}" for colour, shape in objects)


def named_objects(text: str) -> list[tuple[str, str]]:
    """List the colours and names of the shapes that a text names, in its order and as often as it does."""
    found = re.findall(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", text)
    return [(colour, shape) for colour, shape in found]


DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class MovingScene:
    """One shape that crosses the video. A single frame does not show its direction."""

    colour: str
    shape: str
    direction: str

    def render(self, random: np.random.RandomState | None = None, frames: int = 8, pixels: int = 32) -> np.ndarray:
        """Draw a video, (T, H, W, 3), 0..255; without `random`, the same."""
        random = random or np.random.RandomState(0)
        ground, edge = _ground(random, pixels)
        radius = edge * random.uniform(0.18, 0.23)
        across, down = DIRECTIONS[self.direction]
        way = (np.arange(frames) + random.uniform()) / frames
        still = np.full(frames, random.uniform())
        x = still if not across else way if across > 0 else way[::-1]
        y = still if not down else way if down > 0 else way[::-1]
        centres = zip(*(radius + (edge - 2 * radius) * part for part in (x, y)), strict=True)
        shapes = [(self.shape, centre, radius, COLOURS[self.colour]) for centre in centres]
        return np.stack([np.asarray(_drawn(ground.copy(), [shape])) for shape in shapes])


def _ground(random: np.random.RandomState, pixels: int) -> tuple[Image.Image, int]:
    """Return a dark image to draw on, and the length of its edge."""
    edge = SCALE * pixels
    return Image.new("RGB", (edge, edge), tuple(int(v) for v in random.randint(0, 50, 3))), edge


def _in_quarters(
    objects: Sequence[tuple[str, str]], places: Sequence[str], random: np.random.RandomState, pixels: int
) -> Image.Image:
    """Draw an image of coloured shapes in quarters."""
    image, edge = _ground(random, pixels)
    shapes: list[Shape] = []
    for (colour, shape), place in zip(objects, places, strict=True):
        radius = edge * random.uniform(0.18, 0.23)
        x, y = (edge * (middle + random.uniform(-0.02, 0.02)) for middle in PLACES[place])
        shapes.append((shape, (x, y), radius, COLOURS[colour]))
    return _drawn(image, shapes)


def _drawn(image: Image.Image, shapes: list[Shape]) -> Image.Image:
    """Draw shapes on an image, and scale it down."""
    draw = ImageDraw.Draw(image)
    for shape in shapes:
        _draw(draw, *shape)
    return image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.BICUBIC)


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
