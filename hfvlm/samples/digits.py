"""scikit-learn's handwritten digits: 1,797 real ones by 43 writers (UCI, CC BY 4.0), 8 x 8 pixels of 17 greys.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, https://doi.org/10.24432/C50P49.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# One wording a line; {word} is the digit's name and {digit} its numeral.
TEMPLATES = (
    "a handwritten {word}",
    "the digit {word}",
    "the digit {digit}",
    "a {word} written by hand",
    "the number {word} in somebody's handwriting",
    "a small picture of the number {digit}",
    "white ink on black: {word}",
    "{digit}",
)


@dataclass(frozen=True)
class Digit:
    """One picture and what it shows."""

    image: Image.Image
    label: int


def load_digits(split: str, *, size: int = 32) -> list[Digit]:
    """The "train" or the "test" part, three quarters and one quarter of each digit, always the same.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("The digits come with scikit-learn: `pip install 'hfvlm[eval]'`.") from error
    data = load()
    order = np.random.RandomState(0).permutation(len(data.target))
    seen: dict[int, int] = {}
    chosen = []
    for i in order:
        label = int(data.target[i])
        seen[label] = seen.get(label, 0) + 1
        if (seen[label] % 4 == 0) == (split == "test"):
            chosen.append(Digit(_picture(data.images[i], size), label))
    return chosen


def caption(label: int, template: str) -> str:
    return template.format(word=WORDS[label], digit=label)


def jitter(image: Image.Image, random: np.random.RandomState) -> Image.Image:
    """A little turned, scaled and moved, as another hand might have written it."""
    edge = round(image.width * random.uniform(0.9, 1.1))
    offset = (int(random.randint(-2, 3)), int(random.randint(-2, 3)))
    turned = image.rotate(random.uniform(-12, 12), Image.Resampling.BICUBIC, translate=offset)
    canvas = Image.new("RGB", image.size)
    corner = (image.width - edge) // 2
    canvas.paste(turned.resize((edge, edge), Image.Resampling.BICUBIC), (corner, corner))
    return canvas


def _picture(values: np.ndarray, size: int) -> Image.Image:
    grey = Image.fromarray(np.rint(values * (255 / 16)).astype(np.uint8))
    return grey.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
