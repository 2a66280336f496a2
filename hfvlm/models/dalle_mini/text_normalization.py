"""The cleaning of texts that DALL-E mini was trained on (borisdayma/dalle-mini at f0be4de, model/text.py).

Its odd results ("v1.2.3" to "v1.2, 3") are part of what the model has learned.
"""

import html
import random
import re
from bisect import bisect
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate
from math import inf, log

import ftfy

# What stands for a person in CC12M's texts, with its frequency.
PERSONS = {"a person": 282265, "someone": 121194, "somebody": 12219}
# Stands around the names of characters that are put back later; no letter of it repeats.
MARK = "xtokx"
STEPS: tuple[tuple[str, str], ...] = (
    (r"\A\s*\[\d+\]", ""),  # references of Wikipedia
    (r"\[\d+\]\s*\Z", ""),
    (r"<[^<]+?>", " "),  # HTML
    (r"http\S+", ""),
    (r"(\d),(\d{3})", r"\1\2"),  # twice: matches do not overlap
    (r"(\d),(\d{3})", r"\1\2"),
    (r"(\w)\.(\w)", rf"\1{MARK}dot{MARK}\2"),
    (r"'(?=(?:[stdm]|ll|re|ve)\b)", f"{MARK}quote{MARK}"),
    (r"(\d)/(\d)", rf"\1{MARK}slash{MARK}\2"),
    (r"(\w)-(\w)", r"\1 \2"),
    (r"([%&/$*])", r" \1 "),
)
LAST_STEPS: tuple[tuple[str, str], ...] = (
    (r"[_#\\]", " "),
    (r"['\"`]", ' " '),
    (r"[()\[\].,|:;?!=+~\-/{}]", ","),
    (f"{MARK}dot{MARK}", "."),
    (f"{MARK}quote{MARK}", "'"),
    (f"{MARK}slash{MARK}", "/"),
    (r"(\D)\1{3,}", r"\1"),  # not of three, as in VIII
    (r'(?:\s*"+\s*)+', ' " '),
    (r"(?:\s*,+\s*)+", ", "),
    (r"\s+", " "),
)
PERSON = "<person>"
PEOPLE = re.compile(rf"{PERSON}(?:[,\s]*(?:and)*[,\s]*{PERSON})+")
HASHTAG = re.compile(r"#(\w+)")


class MissingPackageError(ImportError):
    """A package that DALL-E mini's texts need is not installed."""


def _package(name: str) -> object:
    try:
        return __import__(name)
    except ImportError as error:
        raise MissingPackageError(
            f"DALL-E mini's texts are cleaned with {name}, which is not installed: pip install 'hfvlm[draw]'."
        ) from error


def demojized(text: str, mark: str = ":") -> str:
    """Name each emoji, between two marks.

    Raises:
        MissingPackageError: emoji is not installed.
    """
    if text.isascii():
        return text
    return _package("emoji").demojize(text, delimiters=(mark, mark))  # type: ignore[attr-defined]


def transliterated(text: str) -> str:
    """Write a text in ASCII.

    Raises:
        MissingPackageError: unidecode is not installed.
    """
    return text if text.isascii() else _package("unidecode").unidecode(text)  # type: ignore[attr-defined]


class Words:
    """Splits hashtags into words: the split whose words have the least summed logarithms of their ranks.

    Args:
        ranked: words, or lines that begin with one, the most frequent first.
    """

    def __init__(self, ranked: Iterable[str]):
        words = (line.split()[0] for line in ranked if line.strip())
        self.costs = {word: log(rank) for rank, word in enumerate(words, 1)}
        self.longest = max(map(len, self.costs), default=1)

    def __call__(self, tag: str) -> str:
        return " ".join(word for part in re.split(r"[^a-zA-Z0-9']+", tag) for word in self.split(part))

    def split(self, text: str) -> list[str]:
        costs, lengths = [0.0], [0]
        for end in range(1, len(text) + 1):
            choices = (
                (costs[end - size] + self.costs.get(text[end - size : end].lower(), inf), size)
                for size in range(1, min(self.longest, end) + 1)
            )
            cost, size = min(choices)
            costs.append(cost)
            lengths.append(size)
        return self.joined(text, lengths)

    def joined(self, text: str, lengths: list[int]) -> list[str]:
        """Return the words from the last to the first, put in order; 's and numbers are joined again."""
        found: list[str] = []
        end = len(text)
        while end > 0:
            word = text[end - lengths[end] : end]
            after = found[-1] if found else ""
            if word != "'" and after and (after == "'s" or (word[-1].isdigit() and after[0].isdigit())):
                found[-1] = word + after
            else:
                found.append(word)
            end -= lengths[end]
        return found[::-1]


def _substituted(text: str, steps: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in steps:
        text = re.sub(pattern, replacement, text)
    return text


def _person(draw: Callable[[], float], _: re.Match[str]) -> str:
    sums = list(accumulate(PERSONS.values()))
    return f" {list(PERSONS)[bisect(sums, draw() * sums[-1], 0, len(sums) - 1)]} "


def normalized(text: str, split_hashtag: Callable[[str], str] = str, draw: Callable[[], float] = random.random) -> str:
    """Clean a text as DALL-E mini does; the result begins with a space.

    Args:
        text: in any language; letters become ASCII, in lower case.
        split_hashtag: into words, as `Words` does.
        draw: a number in 0..1 for each `<person>`.

    Raises:
        MissingPackageError: the text is not ASCII, and emoji or unidecode is not installed.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = transliterated(demojized(text)).lower()
    text = re.sub(PERSON, partial(_person, draw), PEOPLE.sub(" people ", text))
    text = _substituted(text, STEPS)
    text = HASHTAG.sub(lambda found: split_hashtag(found[1]), text)
    text = _substituted(text, LAST_STEPS).strip()
    return f" {text.removesuffix(',').removeprefix(',').strip()}"


def ascii_words(text: str) -> str:
    """Clean a text as min-dalle does: emojis by their names, lower case, other characters than ASCII left out."""
    text = demojized(text, "").lower().encode("ascii", errors="ignore").decode()
    return " ".join(word for word in text.split(" ") if word)
