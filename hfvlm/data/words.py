"""Words of captions, and numbers for texts that a table counts."""

import hashlib
import re
from collections.abc import Sequence
from itertools import pairwise

WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
# Uniform numbers are drawn from this many bits.
BITS = 62


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation; languages that write no spaces have few."""
    return WORD.findall(text.lower())


def pairs_of(words: Sequence[str]) -> list[str]:
    """Return the neighbouring words, as "red circle"."""
    return [f"{a} {b}" for a, b in pairwise(words)]


def key_of(content: str | bytes) -> int:
    """Return a number of 63 bits for a text or bytes: the same in each process, and different for different contents
    up to billions of them."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def drawn(seed: int, *numbers: int) -> float:
    """Draw a uniform number from 0 to 1 that depends on the seed and the numbers alone."""
    text = ",".join(map(str, (seed, *numbers)))
    return (key_of(text) & (2**BITS - 1)) / 2**BITS
