"""Seeded damage to bytes and to JSON, and what came of it."""

import copy
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

NUMBERS = (0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 10**30)
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    2**31,
    2**63,
    10**30,
    0.5,
    -1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
)
VALUES += (
    "\x1b[31m",
    "../..",
    "1" * 5000,
    [],
    {},
    [0],
    [-1, 2],
    ["a"],
    {"a": 1},
    [[]],
    [None],
    "gelu",
    "float16",
    "é",
)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """`data` with one to four kinds of damage."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        chance.choice((flip, flip, overwrite, cut, insert, repeat, move, number))(content, chance)
    return bytes(content)


def flip(content: bytearray, chance: random.Random) -> None:
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def overwrite(content: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 2, 8))):
        if content:
            content[chance.randrange(len(content))] = chance.choice((0, 255, 46, 125, chance.randrange(256)))


def cut(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content) + 1)
    del content[start : start + chance.choice((1, 4, 64, len(content)))]


def insert(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content) + 1)
    content[start:start] = chance.randbytes(chance.choice((1, 4, 64)))


def repeat(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content) + 1)
    content[start:start] = content[start : start + chance.choice((1, 8, 64))] * chance.choice((1, 2, 100))


def move(content: bytearray, chance: random.Random) -> None:
    start, end = (chance.randrange(len(content) + 1) for _ in range(2))
    size = chance.choice((4, 8, 30))
    content[end : end + size] = content[start : start + size]


def number(content: bytearray, chance: random.Random) -> None:
    size = chance.choice((1, 2, 4, 8))
    start = chance.randrange(len(content) + 1)
    content[start : start + size] = (chance.choice(NUMBERS) % 256**size).to_bytes(size, "little")


def mutated_json(value: Any, chance: random.Random) -> Any:
    """`value` with one or two of its parts gone, of another type, or doubled under another name."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 2))):
        value = damaged_json(value, chance)
    return value


def damaged_json(value: Any, chance: random.Random) -> Any:
    if isinstance(value, dict | list) and value and chance.random() < 0.9:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = chance.random()
        if kind < 0.1:
            del value[key]
        elif kind < 0.15 and isinstance(value, dict):
            value[f"{key}_"] = value[key]
        else:
            value[key] = damaged_json(value[key], chance)
        return value
    if isinstance(value, int) and chance.random() < 0.3:
        return chance.choice((-value, value + 1, value * 10**6, value * 1.5, str(value)))
    return copy.deepcopy(chance.choice(VALUES))


class Tally:
    """Counts what came of the inputs of one test, and prints it at the end (`pytest -s`)."""

    def __init__(self, name: str, errors: tuple[type[BaseException], ...], seconds: float = 10.0):
        self.name, self.errors, self.seconds = name, errors, seconds
        self.counts: Counter[str] = Counter()

    def attempt(self, case: str, call: Callable[[], Any], accept: Callable[[Any], str] = lambda _: "accepted") -> str:
        """Call, and count: refused by one of `errors` in a short message without control characters, or what `accept`
        calls the result. Anything else fails, with the case."""
        self.counts["tried"] += 1
        start = time.perf_counter()
        try:
            kind = accept(call())
        except self.errors as error:
            text = str(error)
            assert len(text) < 5000, f"{case}: a message of {len(text)} characters"
            assert all(char.isprintable() or char == "\n" for char in text), f"{case}: {text!r}"
            kind = "refused"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | AssertionError):
                raise
            raise AssertionError(f"{case}: {type(error).__name__}: {str(error)[:300]}") from error
        took = time.perf_counter() - start
        assert took < self.seconds, f"{case}: {took:.1f} s"
        self.counts[kind] += 1
        return kind

    def report(self) -> None:
        sys.stdout.write(f"{self.name}: {dict(self.counts)}\n")
        assert self.counts["refused"], "nothing was refused: the mutations change nothing"
