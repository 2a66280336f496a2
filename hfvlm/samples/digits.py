"""scikit-learn's handwritten digits: 1,797 real ones by 43 writers (UCI, CC BY 4.0), 8 x 8 pixels of 17 greys.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, https://doi.org/10.24432/C50P49.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Prompt templates; {word} is the digit's name and {digit} its numeral. The small CLIP that ships was trained on these.
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
    """An image with its class."""

    image: Image.Image
    label: int


def load_digits(split: str, *, size: int = 32) -> list[Digit]:
    """Load the "train" or the "test" part, three quarters and one quarter of each digit, always the same.

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
            chosen.append(Digit(_image(data.images[i], size), label))
    return chosen


def caption(label: int, template: str) -> str:
    """Fill in a prompt template."""
    return template.format(word=WORDS[label], digit=label)


def jitter(image: Image.Image, random: np.random.RandomState) -> Image.Image:
    """Rotate, scale and move an image a little, as if by another writer."""
    edge = round(image.width * random.uniform(0.9, 1.1))
    offset = (int(random.randint(-2, 3)), int(random.randint(-2, 3)))
    turned = image.rotate(random.uniform(-12, 12), Image.Resampling.BICUBIC, translate=offset)
    canvas = Image.new("RGB", image.size)
    corner = (image.width - edge) // 2
    canvas.paste(turned.resize((edge, edge), Image.Resampling.BICUBIC), (corner, corner))
    return canvas


def _image(values: np.ndarray, size: int) -> Image.Image:
    grey = Image.fromarray(np.rint(values * (255 / 16)).astype(np.uint8))
    return grey.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
