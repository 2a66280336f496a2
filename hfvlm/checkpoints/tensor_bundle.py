"""Reads TensorFlow's checkpoints ("tensor bundles") without TensorFlow: an index, and shards of the tensors' bytes.

The index is a sorted table of LevelDB's kind (tensorflow/core/lib/io/table_format.txt) whose values are protocol
buffers (tensor_bundle.proto, trackable_object_graph.proto). Nothing in a file is run, sizes are checked against the
file before anything is read, and whatever is read is checked against its checksum.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvlm.checkpoints import TABLE_END, CheckpointError
from hfvlm.checks.messages import shown

FOOTER = 48
# Of the index, in bytes; those of models with thousands of tensors have less than one MiB.
LARGEST_INDEX = 2**24
LARGEST_GRAPH = 2**24
LONGEST_KEY = 2**12
# Of all keys, which an index writes without what they share with the one before.
LONGEST_KEYS = 2**23
MOST_ENTRIES = 2**15
MOST_BLOCKS = 2**12
MOST_FIELDS = 2**17
MOST_AXES = 64
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
STRING = 7
DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    5: torch.int16,
    6: torch.int8,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    19: torch.float16,
}


class BundleError(ValueError):
    """What is wrong with a bundle; `TensorBundle` adds where."""


class TensorBundle(Mapping[str, Tensor]):
    """Tensors by their variables' names, left in the file until they are taken.

    Args:
        index: the file `<prefix>.index`; the shards `<prefix>.data-00000-of-00001` lie beside it.

    Raises:
        CheckpointError: the index or a tensor is damaged, or a shard is missing or too short.
    """

    def __init__(self, index: Path):
        self.index = index
        with self.named_errors():
            self.shards, self.entries = read_index(index)

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Raise errors of the format, and whatever foreign bytes bring about, with the file's name."""
        try:
            yield
        except BundleError as error:
            raise CheckpointError(f"{self.index}: damaged TensorFlow checkpoint ({error}).") from error
        except Exception as error:
            raise CheckpointError(
                f"{self.index}: damaged TensorFlow checkpoint ({type(error).__name__}: {error})."
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        with self.named_errors():
            return self.shards.tensor(entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_index(index: Path) -> tuple["Shards", dict[str, "Entry"]]:
    """Return the shards, and where each variable is in them."""
    if index.stat().st_size > LARGEST_INDEX:
        raise BundleError(f"the index has {index.stat().st_size} bytes, more than any index needs")
    rows = dict(table(index.read_bytes()))
    header = message(rows.pop(b"", b""))
    if number(header, 2):
        raise BundleError("stored on a big-endian machine, which is not supported")
    shards = Shards(index.with_suffix(""), number(header, 1))
    entries = {key.decode(): Entry.read(key.decode(), value) for key, value in rows.items()}
    graph = entries.get(OBJECT_GRAPH)
    names = full_names(shards.string(graph)) if graph else {}
    entries = {key: entry for key, entry in entries.items() if entry.dtype != STRING}
    for entry in entries.values():
        shards.check(entry)
    shards.check_sizes(entries.values())
    named = variable_names({key: names.get(key, key) for key in entries})
    return shards, {named[key]: entry for key, entry in entries.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is."""

    key: str
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int

    @classmethod
    def read(cls, key: str, value: bytes) -> "Entry":
        fields = message(value)
        if fields.get(7):
            raise BundleError(f"{shown(key)} is stored in slices, which is not supported")
        sizes = [size for shape in fields.get(2, []) for size in message(shape).get(2, [])]
        if len(sizes) > MOST_AXES:
            raise BundleError(f"{shown(key)} has {len(sizes)} axes, more than any tensor")
        shape = [number(message(size), 1) for size in sizes]
        checksum = struct.unpack("<I", fields.get(6, [b""])[0])[0]
        shard, offset, size = (number(fields, field) for field in (3, 4, 5))
        entry = cls(key, number(fields, 1), tuple(shape), shard, offset, size, checksum)
        if entry.dtype == STRING:
            return entry
        if entry.dtype not in DTYPES:
            raise BundleError(f"{shown(key)} has the data type {entry.dtype}, which no model's weights have")
        if entry.size != prod(shape) * DTYPES[entry.dtype].itemsize:
            raise BundleError(f"{shown(key)} of shape {entry.shape} claims {entry.size} bytes")
        return entry


class Shards:
    """The bytes of the tensors."""

    def __init__(self, prefix: Path, count: int):
        self.files: dict[int, mmap.mmap | bytes] = {}
        self.prefix, self.count = prefix, count
        self.whole: set[str] = set()

    def path(self, shard: int) -> Path:
        """Return a shard's file: a regular one in the index's own folder, or where the Hub's cache keeps both."""
        path = self.prefix.with_name(f"{self.prefix.name}.data-{shard:05d}-of-{self.count:05d}")
        if not path.is_file():
            raise BundleError(f"the shard {path.name} is not beside it")
        if path.resolve().parent not in (path.parent.resolve(), self.prefix.with_suffix(".index").resolve().parent):
            raise BundleError(f"the shard {path.name} is not beside it, but a link out of the folder")
        return path

    def check_sizes(self, entries: Iterable[Entry]) -> None:
        """Check that all tensors together are no larger than the shards: none shares its bytes with another."""
        sizes: Counter[int] = Counter()
        for entry in entries:
            sizes[entry.shard] += entry.size
        for shard, size in sizes.items():
            if size > len(self.data(shard)):
                raise BundleError(f"the tensors of shard {shard} overlap")

    def data(self, shard: int) -> memoryview:
        """Map a shard's file; an empty one has nothing to map."""
        if shard not in self.files:
            path = self.path(shard)
            with path.open("rb") as file:
                empty = not path.stat().st_size
                self.files[shard] = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return memoryview(self.files[shard])

    def view(self, entry: Entry) -> memoryview:
        """Return the tensor's part of the file."""
        data, end = self.data(entry.shard), entry.offset + entry.size
        if end > len(data):
            raise BundleError(
                f"shard {entry.shard} is cut off before the end of {shown(entry.key)}; download it again"
            )
        return data[entry.offset : end]

    def check(self, entry: Entry) -> None:
        """Check that the tensor lies inside its shard."""
        if entry.size:
            self.view(entry)

    def tensor(self, entry: Entry) -> Tensor:
        dtype = DTYPES[entry.dtype]
        if not entry.size:
            return torch.empty(entry.shape, dtype=dtype)
        data = self.view(entry)
        if entry.key not in self.whole:
            verify(entry, crc32c(data))
            self.whole.add(entry.key)
        return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)

    def string(self, entry: Entry) -> bytes:
        """Read a scalar string: its length, a checksum of the length, its bytes."""
        if entry.size > LARGEST_GRAPH:
            raise BundleError(f"{shown(entry.key)} has {entry.size} bytes, more than any model's graph")
        data = bytes(self.view(entry))
        length, start = varint(data, 0)
        if entry.shape or start + 4 + length != entry.size:
            raise BundleError(f"{shown(entry.key)} is not one string")
        verify(entry, crc32c(struct.pack("<I", length) + data[start:]))
        return data[start + 4 :]


def verify(entry: Entry, checksum: int) -> None:
    if masked(checksum) != entry.checksum:
        raise BundleError(f"{shown(entry.key)} does not have the checksum it was stored with; download the file again")


def variable_names(full_names: Mapping[str, str]) -> dict[str, str]:
    """Make full names of variables, by keys, unique: those that several keys have give way to the keys.

    What an optimizer keeps for a variable goes by its key too.
    """
    counts = Counter(full_names.values())
    return {
        key: key if counts[name] > 1 or ".OPTIMIZER_SLOT" in key or key.startswith("optimizer/") else name
        for key, name in full_names.items()
    }


def full_names(graph: bytes) -> dict[str, str]:
    """Read a TrackableObjectGraph -> the variables' full names, by checkpoint keys."""
    names: dict[str, str] = {}
    for node in message(graph).get(1, []):
        for attribute in message(node).get(2, []):
            fields = message(attribute)
            name, key = (b"".join(fields.get(field, [])).decode() for field in (2, 3))
            if name:
                names[key] = name
    return names


# The table: a footer points to an index of blocks, each of which holds sorted keys and their values.


def table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table."""
    if len(data) < FOOTER or data[-8:] != TABLE_END:
        raise BundleError("the index has no footer; it is cut off")
    footer = data[-FOOTER:]
    _, at = handle(footer, 0)
    index, _ = handle(footer, at)
    end, entries, letters = 0, 0, 0
    for i, (_, value) in enumerate(block(data, index)):
        place, _ = handle(value, 0)
        if place[0] < end or i >= MOST_BLOCKS:
            raise BundleError("its blocks overlap, or are too many")
        end = sum(place)
        for key, entry in block(data, place):
            entries, letters = entries + 1, letters + len(key)
            if entries > MOST_ENTRIES or letters > LONGEST_KEYS:
                raise BundleError("the index has more entries, or longer keys, than any checkpoint")
            yield key, entry


def handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Return where a block is: its offset and size; and where the next handle begins."""
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return (offset, size), at


def block(data: bytes, place: tuple[int, int]) -> Iterator[tuple[bytes, bytes]]:
    offset, size = place
    end = offset + size
    if end + 5 > len(data) or size < 4:
        raise BundleError("a block reaches beyond the index")
    if masked(crc32c(data[offset : end + 1])) != struct.unpack_from("<I", data, end + 1)[0]:
        raise BundleError("a block of the index does not have its checksum")
    if data[end]:
        raise BundleError("the index is compressed, which TensorFlow never does")
    end -= 4 + 4 * struct.unpack_from("<I", data, end - 4)[0]  # places where keys are written out
    key, at = b"", offset
    while at < end:
        shared, at = varint(data, at)
        added, at = varint(data, at)
        length, at = varint(data, at)
        if shared > len(key) or shared + added > LONGEST_KEY or at + added + length > end:
            raise BundleError("an entry reaches beyond its block")
        key = key[:shared] + data[at : at + added]
        at += added + length
        yield key, data[at - length : at]


# Protocol buffers


def message(data: bytes, most: int = MOST_FIELDS) -> dict[int, list[Any]]:
    """Return the fields of a message by their numbers: integers, or the bytes of anything else."""
    fields: dict[int, list[Any]] = {}
    at, left = 0, most
    while at < len(data):
        left -= 1
        if left < 0:
            raise BundleError("a message has more fields than any checkpoint needs")
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = varint(data, at)
            fields.setdefault(tag >> 3, []).append(value)
            continue
        if kind == 2:
            size, at = varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise BundleError("a message has a field of an unknown kind")
        if at + size > len(data):
            raise BundleError("a message is cut off")
        fields.setdefault(tag >> 3, []).append(data[at : at + size])
        at += size
    return fields


def number(fields: Mapping[int, list[Any]], field: int) -> int:
    """Return an integer field that is no less than zero, by default zero."""
    value = fields.get(field, [0])[-1]
    if not isinstance(value, int) or value >= 2**63:
        raise BundleError("a message has a number that makes no sense")
    return value


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Read a number of seven bits a byte, the lowest first; and where the next item begins."""
    value = 0
    for i in range(10):
        if at + i >= len(data):
            raise BundleError("the index is cut off within a number")
        value |= (data[at + i] & 127) << 7 * i
        if data[at + i] < 128:
            return value, at + i + 1
    raise BundleError("a number has too many bytes")


# Checksums


def masked(checksum: int) -> int:
    """Mask a checksum as it is stored, so that the checksum of data that holds checksums is not weak."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _byte_table() -> np.ndarray:
    register = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        register = np.where(register & 1, np.uint32(0x82F63B78), np.uint32(0)) ^ register >> 1
    return register


BYTE = _byte_table()
BYTES = BYTE.tolist()
# In bytes: so little is faster taken one by one.
SHORT = 2**11


def crc32c(data: Any) -> int:
    """Compute Castagnoli's checksum. It is linear, so stretches of data are taken side by side, and then joined in
    pairs."""
    if len(data) <= SHORT:
        register = 0xFFFFFFFF
        for byte in bytes(data):
            register = BYTES[(register ^ byte) & 255] ^ register >> 8
        return register ^ 0xFFFFFFFF
    source = np.frombuffer(data, dtype=np.uint8)
    lanes = 2 ** min(16, len(source).bit_length() - 6)
    length = -(-len(source) // lanes)
    # Zeros in front change nothing in a register of zeros; the usual register of ones is one more term of the sum.
    padded = np.zeros(lanes * length, dtype=np.uint8)
    padded[len(padded) - len(source) :] = source
    stretches = padded.reshape(lanes, length)
    registers = np.zeros(lanes, dtype=np.uint32)
    for i in range(length):
        registers = BYTE[(registers ^ stretches[:, i]) & 255] ^ registers >> 8
    shift = shift_by(length)
    while len(registers) > 1:
        registers = shifted(shift, registers[0::2]) ^ registers[1::2]
        shift = shifted(shift, shift)
    ones = shifted(shift_by(len(source)), np.array([0xFFFFFFFF], dtype=np.uint32))
    return int(registers[0] ^ ones[0]) ^ 0xFFFFFFFF


def shift_by(length: int) -> np.ndarray:
    """Return what `length` bytes of zero do to a register: a table for each of its four bytes, `(4, 256)`."""
    byte = np.arange(256, dtype=np.uint32)
    power, result = np.stack([BYTE, byte, byte << 8, byte << 16]), np.stack([byte << 8 * i for i in range(4)])
    while length:
        if length & 1:
            result = shifted(power, result)
        power = shifted(power, power)
        length >>= 1
    return result


def shifted(shift: np.ndarray, registers: np.ndarray) -> np.ndarray:
    return (
        shift[0][registers & 255]
        ^ shift[1][registers >> 8 & 255]
        ^ shift[2][registers >> 16 & 255]
        ^ (shift[3][registers >> 24])
    )
