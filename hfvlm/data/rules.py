"""ALIGN's rules for images and texts (https://arxiv.org/abs/2102.05918, section 3), each with its threshold."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from PIL import Image

from hfvlm.checks.ranges import check_integer, check_number

# What each rule drops; the order is that in which the first one that a row breaks becomes the reason.
RULES = {
    "unreadable": "the image is missing or damaged",
    "small": "its shorter edge has min_edge pixels or fewer",
    "elongated": "its longer edge is max_aspect times the shorter one or more",
    "many-texts": "it comes with more than max_texts different texts",
    "test-duplicate": "it is a near duplicate of an image of a test set",
    "no-text": "there is no text",
    "boilerplate": "more than max_images different images share the text",
    "rare-token": "a word, or two neighbouring ones, is not among the `vocabulary` most frequent ones",
    "rare-word": "a word occurs fewer than min_count times in all texts (not the paper's; off by default)",
    "short": "it has fewer than min_words words",
    "long": "it has more than max_words words",
}


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of the rules; the defaults are the paper's.

    Args:
        min_edge: the shorter edge of an image must have more pixels; 0 for no limit.
        max_aspect: the longer edge divided by the shorter one must be less.
        max_texts: an image may come with as many different texts.
        max_images: a text may belong to as many different images.
        vocabulary: as many words and pairs of neighbouring words are frequent.
        min_count: a word must occur as often in all texts. It is not the paper's, whose vocabulary is larger than
            those of small data sets.
        min_words: a text must have as many words.
        max_words: a text may have as many words.

    Raises:
        ValueError: a number is out of its range.
    """

    min_edge: int = 200
    max_aspect: float = 3.0
    max_texts: int = 1000
    max_images: int = 10
    vocabulary: int = 100_000_000
    min_count: int = 1
    min_words: int = 3
    max_words: int = 20

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name != "max_aspect":
                check_integer(each.name, getattr(self, each.name), 0 if each.name.startswith("min") else 1)
        check_number("max_aspect", self.max_aspect, 1, open_low=True)
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is more than max_words {self.max_words}: no text has both.")

    def settings(self) -> dict[str, Any]:
        """Return the thresholds by name."""
        return asdict(self)

    def of_image(self, image: Image.Image) -> list[tuple[str, str]]:
        """Return the rules that an image breaks by its size, with notes."""
        short, long = sorted(image.size)
        found = []
        if short <= self.min_edge:
            found.append(("small", f"{image.width} x {image.height} pixels"))
        if long >= self.max_aspect * short:
            found.append(("elongated", f"{image.width} x {image.height} pixels"))
        return found

    def of_length(self, words: int) -> list[tuple[str, str]]:
        """Return the rules that a text breaks by its number of words, with notes."""
        note = f"{words} word{'' if words == 1 else 's'}"
        if words < self.min_words:
            return [("short", note)]
        return [("long", note)] if words > self.max_words else []
