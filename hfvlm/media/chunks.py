"""Chunked audio files (WAV, RF64, W64, AIFF, CAF, AU): where their samples are, whatever their headers claim.

Recorders that crash or write to pipes leave sizes of 0 or of 2 GiB and more, and editors leave sizes of another file.
A size counts only where the file itself agrees with it.
"""

import io
from dataclasses import dataclass
from typing import BinaryIO

from hfvlm.media.errors import MediaError

MAX_BYTES = 2**31
# Sizes of chunks whose end a program did not know yet begin here; those of 8 bytes are negative or 0, too.
UNKNOWN_FROM = 0x7FFFF000
MAX_CHUNKS = 4096
# Tags that programs append to any file; they are no samples.
TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICS")
W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"


@dataclass(frozen=True)
class Family:
    """The layout of the chunks of one family of files.

    Args:
        order: of the bytes of a size.
        outer: bytes before the first chunk.
        outer_size: offset and bytes of the size of the whole file; None where it has none.
        id_bytes: of a chunk's name.
        size_bytes: of a chunk's size.
        align: chunks begin at multiples of it.
        data: the name of the chunk with the samples.
        inclusive: sizes count the chunk's own header.
    """

    order: str
    outer: int
    outer_size: tuple[int, int] | None
    id_bytes: int = 4
    size_bytes: int = 4
    align: int = 2
    data: bytes = b"data"
    inclusive: bool = False

    @property
    def header(self) -> int:
        return self.id_bytes + self.size_bytes

    def number(self, data: bytes) -> int:
        return int.from_bytes(data, self.order, signed=self.size_bytes == 8)  # type: ignore[arg-type]

    def encoded(self, value: int, size: int) -> bytes:
        return value.to_bytes(size, self.order)  # type: ignore[arg-type]


RIFF = Family("little", 12, (4, 4))
FAMILIES = {
    b"RIFF": RIFF,
    b"RF64": RIFF,
    b"BW64": RIFF,
    b"RIFX": Family("big", 12, (4, 4)),
    b"FORM": Family("big", 12, (4, 4), data=b"SSND"),
    b"riff": Family("little", 40, (16, 8), 16, 8, 8, W64_DATA, inclusive=True),
    b"caff": Family("big", 8, None, size_bytes=8, align=1),
    b".snd": Family("big", 0, None, data=b""),
}


@dataclass(frozen=True)
class Samples:
    """Where the samples of a recording are: `size` bytes at `start`; `size_at` is the offset of that size, and
    `end` is where the next recording of the file begins, or the file ends."""

    start: int
    size: int
    size_at: int
    end: int
    claimed: int


def recordings(file: BinaryIO, name: str) -> list[BinaryIO] | None:
    """Return the recordings of a chunked file, each as a file of its own whose sizes are right; None for other files.

    A file whose sizes are right already is returned as it is.

    Raises:
        MediaError: the file ends before its samples do.
    """
    begin = file.tell()
    file.seek(0, io.SEEK_END)
    end, found, place = file.tell(), [], begin
    while place < end and (family := _family(file, place)) is not None:
        samples = _find(file, family, place, end, name)
        if samples is None:
            break
        found.append((family, place, samples))
        place = samples.end
    file.seek(begin)
    if not found:
        return None
    if len(found) == 1 and found[0][2].size == found[0][2].claimed:
        return [file]
    return [_repaired(file, family, place, samples, name) for family, place, samples in found]


def _family(file: BinaryIO, place: int) -> Family | None:
    file.seek(place)
    head = file.read(12)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:] != b"WAVE":
        return None
    if head[:4] == b"FORM" and head[8:] not in (b"AIFF", b"AIFC"):
        return None
    return FAMILIES.get(head[:4])


def _find(file: BinaryIO, family: Family, begin: int, end: int, name: str) -> Samples | None:
    """Find the samples of the recording that begins at `begin`; None where it has none."""
    file.seek(begin)
    head = file.read(40)
    if head[:4] == b".snd":
        offset, claimed = (family.number(head[i : i + 4]) for i in (4, 8))
        return _extent(file, family, begin, (begin + offset, claimed, begin + 8), end, name) if offset <= end else None
    wide, place = None, begin + family.outer
    for _ in range(MAX_CHUNKS):
        file.seek(place)
        head = file.read(family.header + 16)
        if len(head) < family.header:
            return None
        size = family.number(head[family.id_bytes : family.header]) - (family.header if family.inclusive else 0)
        inside = place + family.header
        if head[: family.id_bytes] == b"ds64":
            wide = int.from_bytes(head[16:24], "little")
        if head[: family.id_bytes] == family.data:
            claimed = wide if wide is not None and size == 0xFFFFFFFF else size
            return _extent(file, family, begin, (inside, claimed, place + family.id_bytes), end, name)
        if size < 0 or inside + size > end:
            return None
        place = inside + size + -(inside + size - begin) % family.align
    return None


def _extent(
    file: BinaryIO, family: Family, begin: int, chunk: tuple[int, int, int], end: int, name: str
) -> Samples | None:
    """Find the extent of samples that begin at `chunk[0]` and claim to be of `chunk[1]` bytes."""
    start, claimed, size_at = chunk
    there = end - start
    if there <= 0:
        return None
    if claimed < 0 or claimed >= UNKNOWN_FROM:
        return Samples(start, there, size_at, end, claimed)
    if claimed > there:
        if claimed - there > 1 and not _outer_agrees(file, family, begin, end):
            raise MediaError(f"{name}: truncated; {there} of its {claimed} bytes of samples are there.")
        return Samples(start, there, size_at, end, claimed)
    after = start + claimed
    followers = {after, after + -(after - begin) % family.align}
    ends = [found for place in sorted(followers) if (found := _after(file, family, place, end)) is not None]
    if ends:
        return Samples(start, claimed, size_at, ends[0], claimed)
    return Samples(start, there, size_at, end, claimed)


def _outer_agrees(file: BinaryIO, family: Family, begin: int, end: int) -> bool:
    """Whether the size in the file's header agrees with its end."""
    if family.outer_size is None:
        return False
    place, size = family.outer_size
    file.seek(begin + place)
    claimed = family.number(file.read(size)) + (0 if family.inclusive else 8)
    return abs(begin + claimed - end) <= 8


def _after(file: BinaryIO, family: Family, place: int, end: int) -> int | None:
    """Find the end of the recording whose samples end at `place`: another recording, or the end of the file, if only
    chunks or tags follow; None if anything else follows, which is more samples."""
    for i in range(MAX_CHUNKS):
        file.seek(place)
        head = file.read(family.header)
        if len(head) < family.header or head.startswith(TAGS):
            return end
        if head[:4] in FAMILIES and _family(file, place) is not None:
            return place
        size = family.number(head[family.id_bytes :]) - (family.header if family.inclusive else 0)
        printable = all(32 <= byte < 127 for byte in head[:4])
        if not family.data or not printable or not 0 <= size <= end - place - family.header + 1:
            return end if i else None
        place += family.header + size
        place += -place % family.align if family.align == 2 else 0
    return end


def _repaired(file: BinaryIO, family: Family, begin: int, samples: Samples, name: str) -> BinaryIO:
    """Return one recording with the right sizes, in memory."""
    length = samples.start - begin
    if length + samples.size > MAX_BYTES:
        raise MediaError(f"{name}: more than {MAX_BYTES // 2**20} MiB are refused. Cut it into parts.")
    file.seek(begin)
    head = bytearray(file.read(length))
    if head[:4] in (b"RF64", b"BW64"):
        head[:4] = b"RIFF"
        head = bytearray(bytes(head).replace(b"ds64", b"JUNK", 1))
    at, own = samples.size_at - begin, family.header if family.inclusive else 0
    head[at : at + family.size_bytes] = family.encoded(samples.size + own, family.size_bytes)
    if family.outer_size is not None:
        place, size = family.outer_size
        whole = length + samples.size - (0 if family.inclusive else 8)
        head[place : place + size] = family.encoded(whole, size)
    return io.BytesIO(bytes(head) + file.read(samples.size))
