"""Files of `flax.serialization`: nested dictionaries in MessagePack, whose arrays are an extension of it.

Only the structure is read; an array's numbers stay in the file until they are taken. Format:
https://github.com/msgpack/msgpack/blob/master/spec.md, and google/flax at v0.7.2, flax/serialization.py.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfvlm.checkpoints.errors import CheckpointError
from hfvlm.checks.files import refusing
from hfvlm.checks.messages import shown

# Beginnings of a dictionary.
SMALL_MAP, MAP16, MAP32 = 0x80, 0xDE, 0xDF
# Extensions of arrays, and of numbers that are stored as such.
ARRAYS = (1, 3)
CHUNKED = "__msgpack_chunked_array__"
DEEPEST, MOST_ENTRIES, MOST_AXES = 64, 2**20, 64
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
# Bytes of what comes after a first byte: of numbers, and of the length of what has one.
NUMBERS = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
BINARY = {0xC4: 1, 0xC5: 2, 0xC6: 4}
TEXTS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
LISTS = {0xDC: 2, 0xDD: 4}
MAPS = {MAP16: 2, MAP32: 4}
FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
PLAIN = {0xC0: None, 0xC2: False, 0xC3: True}


class Place(NamedTuple):
    """Where bytes are in a file."""

    start: int
    size: int


class Array(NamedTuple):
    """An array: its numbers are in one place, or in several that follow each other."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    places: tuple[Place, ...]


def is_flax(head: bytes) -> bool:
    """Return whether a file begins as one of Flax: with a dictionary whose first key is a text."""
    skip = 1 + MAPS.get(head[0], 0) if head else 1
    if not head or not (SMALL_MAP < head[0] < 0x90 or head[0] in MAPS) or len(head) <= skip:
        return False
    return 0xA0 < head[skip] < 0xC0 or head[skip] in TEXTS


def without_counts(tree: Any) -> Any:
    """Leave out the numbers next to a training's weights, such as that of its steps."""
    if not isinstance(tree, Mapping) or not any(isinstance(value, Mapping) for value in tree.values()):
        return tree
    return {name: value for name, value in tree.items() if not isinstance(value, int | float)}


class FlaxFile(Mapping[str, Tensor]):
    """Arrays of a file by their names, which "/" joins.

    Raises:
        CheckpointError: the file is damaged, or holds anything but dictionaries of arrays; the message names which.
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.position, self.entries = 0, 0
        with refusing(path, "damaged Flax file, download it again", CheckpointError):
            tree = self.value(0)
            if self.position != len(self.memory):
                raise ValueError(f"{len(self.memory) - self.position} bytes after its end")
        self.arrays = dict(self.named(without_counts(tree), ""))

    # The structure

    def bytes(self, size: int) -> memoryview:
        """Take the next bytes.

        Raises:
            ValueError: the file ends before.
        """
        place = self.place(size)
        return memoryview(self.memory)[place.start : place.start + place.size]

    def place(self, size: int) -> Place:
        """Pass over bytes, and return where they are."""
        if size > len(self.memory) - self.position:
            raise ValueError(f"cut off at byte {self.position}")
        self.position += size
        return Place(self.position - size, size)

    def number(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "big")

    def value(self, depth: int) -> Any:
        """Read the next value; binary data and arrays by their places."""
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels")
        self.entries += 1
        if self.entries > MOST_ENTRIES:
            raise ValueError(f"more than {MOST_ENTRIES} entries")
        first = self.number(1)
        if first < 0x80 or first >= 0xE0:
            return first if first < 0x80 else first - 256
        if first in PLAIN:
            return PLAIN[first]
        if first in NUMBERS:
            return self.integer(first)
        if 0xA0 <= first < 0xC0 or first in TEXTS:
            return bytes(self.bytes(first - 0xA0 if first < 0xC0 else self.number(TEXTS[first]))).decode()
        if first in BINARY:
            return self.place(self.number(BINARY[first]))
        return self.container(first, depth)

    def integer(self, first: int) -> int | float:
        kind = {0xCA: ">f", 0xCB: ">d"}.get(first)
        data = self.bytes(NUMBERS[first])
        return struct.unpack(kind, data)[0] if kind else int.from_bytes(data, "big", signed=first >= 0xD0)

    def container(self, first: int, depth: int) -> Any:
        if first < 0x90 or first in MAPS:
            count = first - SMALL_MAP if first < 0x90 else self.number(MAPS[first])
            pairs = [(self.value(depth + 1), self.value(depth + 1)) for _ in range(count)]
            found = {name: value for name, value in pairs if isinstance(name, str)}
            if len(found) != len(pairs):
                raise ValueError("a dictionary whose names are no texts, or repeat")
            return self.whole(found) if CHUNKED in found else found
        if first < 0xA0 or first in LISTS:
            count = first - 0x90 if first < 0xA0 else self.number(LISTS[first])
            return [self.value(depth + 1) for _ in range(count)]
        if first in FIXED_EXTENSIONS or first in EXTENSIONS:
            size = FIXED_EXTENSIONS[first] if first in FIXED_EXTENSIONS else self.number(EXTENSIONS[first])
            return self.extension(size, depth)
        raise ValueError(f"byte {first:#x} begins nothing")

    def extension(self, size: int, depth: int) -> Array:
        """Read an array: shape, type and numbers, as a list of its own."""
        kind = self.number(1)
        if kind not in ARRAYS:
            raise ValueError(f"extension {kind} is no array")
        end = self.position + size
        parts = self.value(depth + 1)
        if not isinstance(parts, list) or len(parts) != 3 or self.position != end:
            raise ValueError("an array without shape, type and numbers")
        shape, dtype, place = parts
        return self.checked(shape, dtype, (place,))

    def checked(self, shape: Any, dtype: Any, places: tuple[Any, ...]) -> Array:
        if not isinstance(shape, list) or len(shape) > MOST_AXES or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{shown(shape)} is no shape")
        if dtype not in DTYPES:
            raise ValueError(f"an array of {shown(dtype)}")
        bytes_in_all = sum(place.size for place in places if isinstance(place, Place))
        if prod(shape) * DTYPES[dtype].itemsize != bytes_in_all:
            raise ValueError(f"an array of shape {shown(shape)} in {bytes_in_all} bytes")
        return Array(tuple(shape), DTYPES[dtype], places)

    def whole(self, parts: Mapping[str, Any]) -> Array:
        """Put together an array of more than a gigabyte, which is stored in parts."""
        shape, chunks = (self.in_order(parts.get(name)) for name in ("shape", "chunks"))
        if not chunks or not all(isinstance(chunk, Array) and chunk.dtype == chunks[0].dtype for chunk in chunks):
            raise ValueError("an array in parts that are none")
        name = next(name for name, dtype in DTYPES.items() if dtype == chunks[0].dtype)
        return self.checked(shape, name, tuple(place for chunk in chunks for place in chunk.places))

    @staticmethod
    def in_order(numbered: Any) -> list[Any]:
        """Return the values of a dictionary whose names count from 0."""
        if not isinstance(numbered, Mapping) or set(numbered) != {str(i) for i in range(len(numbered))}:
            raise ValueError(f"{shown(numbered)} does not count its entries")
        return [numbered[str(i)] for i in range(len(numbered))]

    def named(self, tree: Any, prefix: str) -> Iterator[tuple[str, Array]]:
        """Yield the arrays below a dictionary with their names."""
        if not isinstance(tree, Mapping):
            raise CheckpointError(f"{self.path}: {shown(prefix or 'the file')} is a {type(tree).__name__}, no array.")
        for name, value in tree.items():
            if isinstance(value, Array):
                yield prefix + name, value
            elif value is not None:
                yield from self.named(value, f"{prefix}{name}/")

    # The numbers

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype, places = self.arrays[name]
        if not prod(shape):
            return torch.empty(shape, dtype=dtype)
        parts = [bytearray(memoryview(self.memory)[start : start + size]) for start, size in places]
        data = parts[0] if len(parts) == 1 else bytearray().join(parts)
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)
