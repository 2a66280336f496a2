"""Streamed files (Ogg, FLAC, MP3, Matroska): whether they are cut, and the several recordings that one may hold.

A file is cut where it ends inside one of its own parts, whatever length its header claims.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

FIRST_PAGE, LAST_PAGE = 2, 4
SEGMENT = b"\x18\x53\x80\x67"
FLAC_MARK = b"fLaC\x00\x00\x00\x22"
BLOCK = 2**20


def length_of(file: BinaryIO) -> int:
    """Return the number of bytes of an open file, which stays where it is."""
    place = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(place)
    return end


# Ogg: pages of one or more logical streams; links are recordings one after the other.


def ogg_pages(file: BinaryIO, begin: int) -> Iterator[tuple[int, int, int]]:
    """Yield the start and the end of each page, and its flags; the last one may end beyond the file."""
    place, end = begin, length_of(file)
    while place + 27 <= end:
        file.seek(place)
        head = file.read(27 + 255)
        if not head.startswith(b"OggS"):
            return
        lacing = head[27 : 27 + head[26]]
        following = place + 27 + head[26] + sum(lacing)
        yield place, following, head[5]
        place = following


def ogg_links(file: BinaryIO) -> tuple[list[tuple[int, int]], bool]:
    """Return the start and the end of each recording, and whether the file ends inside a page of an unfinished one."""
    begin, end = file.tell(), length_of(file)
    starts, between, last = [begin], True, (end, 0)
    for place, following, flags in ogg_pages(file, begin):
        first = bool(flags & FIRST_PAGE)
        if first and not between:
            starts.append(place)
        between, last = first, (following, flags)
    file.seek(begin)
    cut = last[0] > end or (last[0] < end and not last[1] & LAST_PAGE and end - last[0] < 27)
    return list(zip(starts, [*starts[1:], end], strict=True)), cut


# FLAC: its first block.


@dataclass(frozen=True)
class FlacInfo:
    """The number of samples of each channel, 0 where it is unknown, the bits of each, and their MD5 sum."""

    samples: int
    bits: int
    md5: bytes

    def holds(self, samples: np.ndarray) -> bool:
        """Whether `(channels, N)`, floating point, are the samples whose sum was stored."""
        width, digest = (self.bits + 7) // 8, hashlib.md5(usedforsecurity=False)
        for start in range(0, samples.shape[1], BLOCK):
            block = np.ascontiguousarray(samples[:, start : start + BLOCK].T, dtype=np.float64)
            scaled = np.rint(block * 2.0 ** (self.bits - 1)).clip(-(2**31), 2**31 - 1).astype("<i4")
            digest.update(scaled.view(np.uint8).reshape(-1, 4)[:, :width].tobytes())
        return digest.digest() == self.md5


def flac_info(file: BinaryIO) -> FlacInfo | None:
    """Read the first block of a FLAC file; None for other files."""
    place = file.tell()
    head = file.read(42)
    file.seek(place)
    if len(head) < 42 or not head.startswith(FLAC_MARK):
        return None
    packed = int.from_bytes(head[18:26], "big")
    return FlacInfo(packed & (2**36 - 1), (packed >> 36 & 31) + 1, head[26:42])


def flac_recordings(file: BinaryIO) -> list[tuple[int, int]]:
    """Return the start and the end of each recording of a file that was made of several."""
    begin, end = file.tell(), length_of(file)
    starts: list[int] = []
    place, before = begin, b""
    while block := file.read(BLOCK):
        data, offset = before + block, place - len(before)
        found = data.find(FLAC_MARK)
        while found >= 0:
            starts.append(offset + found)
            found = data.find(FLAC_MARK, found + 1)
        place += len(block)
        before = data[-len(FLAC_MARK) + 1 :]
    file.seek(begin)
    starts = starts or [begin]
    return list(zip(starts, [*starts[1:], end], strict=True))


# MP3: the header that encoders put into a first, silent frame.


def mp3_is_cut(file: BinaryIO, decoded: int) -> bool:
    """Whether a file is shorter than its Xing header claims, in bytes and in samples, of which `decoded` are there."""
    begin, end = file.tell(), length_of(file)
    head = file.read(2**16)
    if head.startswith(b"ID3") and len(head) > 10:
        begin += 10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(head[6:10]))
        file.seek(begin)
        head = file.read(2**12)
    file.seek(begin)
    place = max(head.find(mark, 0, 256) for mark in (b"Xing", b"Info"))
    if place < 0 or len(head) < place + 16 or head[place + 7] & 3 != 3 or head[0] != 0xFF:
        return False
    frames, size = (int.from_bytes(head[place + i : place + i + 4], "big") for i in (8, 12))
    each = 1152 if head[1] & 8 else 576
    return begin + size > end and decoded < (frames - 4) * each


# Matroska and WebM: elements inside elements.


def matroska_is_cut(file: BinaryIO) -> bool:
    """Whether the file ends inside an element, where its header claims that it is longer."""
    place, end = file.tell(), length_of(file)
    until = end
    for _ in range(2**20):
        file.seek(place)
        head = file.read(12)
        name, size = _element_name(head), None
        if name:
            size = _element_size(head[len(name) :])
        if size is None:
            break
        inside = place + len(name) + size[0]
        if name == SEGMENT:
            if size[1] is None or inside + size[1] <= end:
                return False
            until, place = inside + size[1], inside
            continue
        if size[1] is None:
            return False
        place = inside + size[1]
        if place >= end:
            break
    return until > end and place != end


def _element_name(head: bytes) -> bytes:
    length = 9 - head[0].bit_length() if head and head[0] else 9
    return head[:length] if length <= 4 else b""


def _element_size(data: bytes) -> tuple[int, int | None] | None:
    """Return the length of the size field, and the size; None for one that is unknown."""
    if not data or not data[0]:
        return None
    length = 9 - data[0].bit_length()
    if len(data) < length:
        return None
    value = int.from_bytes(data[:length], "big") & (1 << 7 * length) - 1
    return length, None if value == (1 << 7 * length) - 1 else value
