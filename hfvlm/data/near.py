"""Near duplicates by locality-sensitive hashing: each row is compared with those alone that share a band of bits.

A descriptor has 64 bits or more, of which two near duplicates differ in few. A band is a sample of `width` of them;
`width` grows with the logarithm of the number of rows, so that unlike rows share a band with a chance of at most one
in as many. There are so many bands that near duplicates at the threshold share one with a chance of RECALL. So the
comparisons of a row do not grow with the number of rows; and each is exact.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import acos, ceil, log, log2, pi, prod
from typing import Any, Protocol

import numpy as np

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.data.hashes import BITS, HASH_BYTES, colour_difference, describe, differing_bits
from hfvlm.data.reading import Source, open_source
from hfvlm.data.store import Store
from hfvlm.inference.embedder import Embedder
from hfvlm.inference.pins import content_hash, processor_hash
from hfvlm.media.errors import MediaError
from hfvlm.media.images import read_image

RECALL = 0.99
NARROWEST, WIDEST = 8, 48
# Planes that the signs of vectors are taken of.
PLANES = 512
TEST_ROWS = 1024


class Likeness(Protocol):
    """A descriptor of images, and what counts as the same."""

    bits: int

    @property
    def settings(self) -> dict[str, Any]:
        """All that decisions depend on."""

    @property
    def flips(self) -> float:
        """The share of bits that differ between images that are only just the same."""

    def describe(self, media: Sequence[Any]) -> list[bytes | None]:
        """Describe images; None for those that cannot be read."""

    def signs(self, descriptor: bytes) -> np.ndarray:
        """Return the bits of a descriptor, (bits,)."""

    def compare(self, one: bytes, other: bytes) -> tuple[bool, float]:
        """Return whether two images are the same, and their difference or cosine."""


@dataclass(frozen=True)
class Perceptual:
    """Copies that were scaled, compressed or filtered a little; neither cropped nor mirrored ones.

    Args:
        distance: of 64 bits, how many may differ.
        colour: how much thumbnails may differ on the average, of 255.

    Raises:
        ValueError: a number is out of its range.
    """

    distance: int = 4
    colour: float = 8.0
    bits = BITS

    def __post_init__(self) -> None:
        check_integer("distance", self.distance, 0, BITS // 4)
        check_number("colour", self.colour, 0, 255)

    @property
    def settings(self) -> dict[str, Any]:
        return {"by": "perceptual", "distance": self.distance, "colour": self.colour}

    @property
    def flips(self) -> float:
        return self.distance / BITS

    def describe(self, media: Sequence[Any]) -> list[bytes | None]:
        return [described(each) for each in media]

    def signs(self, descriptor: bytes) -> np.ndarray:
        return np.unpackbits(np.frombuffer(descriptor, np.uint8, HASH_BYTES)).astype(bool)

    def compare(self, one: bytes, other: bytes) -> tuple[bool, float]:
        distance = differing_bits(one, other)
        same = distance <= self.distance and colour_difference(one, other) <= self.colour
        return same, float(distance)


class Embedded:
    """Images of nearly the same vector, by a model of the user's choice.

    Args:
        embedder: of the model.
        threshold: least cosine of the same images.
        batch_size: images that the model takes at a time.

    Raises:
        ValueError: the model does not embed images, or a number is out of its range.
    """

    bits = PLANES

    def __init__(self, embedder: Embedder, threshold: float = 0.95, batch_size: int = 64):
        embedder.check(["image"])
        self.embedder = embedder
        self.threshold = check_number("threshold", threshold, 0, 1)
        self.batch_size = check_integer("batch_size", batch_size)
        self.planes = np.random.default_rng(0).standard_normal((embedder.size, PLANES)).astype(np.float32)

    @property
    def settings(self) -> dict[str, Any]:
        hashes = {"weights": content_hash(self.embedder.model), "processor": processor_hash(self.embedder.processor)}
        return {"by": "embedding", "threshold": self.threshold} | hashes

    @property
    def flips(self) -> float:
        return acos(self.threshold) / pi

    def describe(self, media: Sequence[Any]) -> list[bytes | None]:
        images = [readable(each) for each in media]
        given = [image for image in images if image is not None]
        vectors = iter(self.embedder.encode(image=given, batch_size=self.batch_size) if given else [])
        return [None if image is None else next(vectors).astype(np.float32).tobytes() for image in images]

    def signs(self, descriptor: bytes) -> np.ndarray:
        return np.frombuffer(descriptor, np.float32) @ self.planes > 0

    def compare(self, one: bytes, other: bytes) -> tuple[bool, float]:
        cosine = float(np.frombuffer(one, np.float32) @ np.frombuffer(other, np.float32))
        return cosine >= self.threshold - 1e-6, cosine


def described(media: Any) -> bytes | None:
    """Describe an image; None for one that cannot be read."""
    try:
        return describe(read_image(media))
    except MediaError:
        return None


def readable(media: Any) -> Any:
    """Read an image; None for one that cannot be read."""
    try:
        return read_image(media)
    except MediaError:
        return None


@dataclass(frozen=True)
class Hit:
    """A row that another one repeats: its group (0, or the number of a test set), its number, and the difference."""

    group: int
    row: int
    value: float


def bands_for(rows: int, bits: int, flips: float) -> tuple[int, int]:
    """Return the width of a band for so many rows, and the number of bands.

    Args:
        rows: that are compared.
        bits: of a descriptor.
        flips: see `Likeness`.
    """
    width = min(max(NARROWEST, ceil(log2(max(2, rows))) + 1), WIDEST)
    flipped = ceil(flips * bits)
    # The chance that none of the bits of a sample is flipped.
    shared = prod((bits - flipped - i) / (bits - i) for i in range(width))
    return width, 1 if shared >= RECALL else ceil(log(1 - RECALL) / log(1 - shared))


class Near:
    """An index of descriptors in a store, by group: 0 for rows that are kept, 1 and more for test sets.

    Args:
        store: of the run.
        likeness: of the descriptors.
    """

    def __init__(self, store: Store, likeness: Likeness):
        self.store, self.likeness = store, likeness
        # Pairs of rows that were compared since it was last set to 0.
        self.comparisons = 0
        store.create("described", "grp INTEGER, row INTEGER, data BLOB", "grp, row")
        store.create("bands", "grp INTEGER, band INTEGER, value INTEGER, row INTEGER", "grp, band, value, row")

    def describe(self, group: int, rows: Sequence[tuple[int, Any]]) -> None:
        """Store the descriptors of numbered images; those that cannot be read have none."""
        found = self.likeness.describe([media for _, media in rows])
        self.store.connection.executemany(
            "INSERT OR REPLACE INTO described VALUES (?, ?, ?)",
            ((group, number, data) for (number, _), data in zip(rows, found, strict=True) if data is not None),
        )

    def prepare(self) -> None:
        """Choose the bands for the rows that are described, and put those of test sets into the index, once a run."""
        if self.store.done("bands"):
            return
        with self.store.step("bands", 0):
            rows = self.store.one("SELECT count(*) FROM described")
            width, bands = bands_for(rows, self.likeness.bits, self.likeness.flips)
            self.store.put("band width", width)
            self.store.put("bands", bands)
            for group, number, data in self.store.run("SELECT grp, row, data FROM described WHERE grp > 0"):
                self.add(group, number, data)

    @cached_property
    def positions(self) -> np.ndarray:
        """The bits of each band, (bands, width): samples by chance, the same in each run."""
        width, bands = int(self.store.get("band width")), int(self.store.get("bands"))
        random = np.random.default_rng(0)
        return np.stack([random.permutation(self.likeness.bits)[:width] for _ in range(bands)])

    def values(self, descriptor: bytes) -> list[tuple[int, int]]:
        """Return (band, value) for each band of a descriptor."""
        powers = 1 << np.arange(self.positions.shape[1], dtype=np.int64)
        return list(enumerate((self.likeness.signs(descriptor)[self.positions] @ powers).tolist()))

    def descriptor(self, group: int, row: int) -> bytes | None:
        """Return the descriptor of a row, if its image can be read."""
        return self.store.one("SELECT data FROM described WHERE grp = ? AND row = ?", group, row)

    def add(self, group: int, row: int, descriptor: bytes) -> None:
        """Put a row into the index."""
        self.store.connection.executemany(
            "INSERT OR REPLACE INTO bands VALUES (?, ?, ?, ?)",
            ((group, band, value, row) for band, value in self.values(descriptor)),
        )

    def hits(self, group: int, descriptor: bytes) -> Iterator[Hit]:
        """Yield the rows of a group that are the same as a descriptor, in their order."""
        statement = "SELECT row FROM bands WHERE grp = ? AND band = ? AND value = ?"
        found = {row for band in self.values(descriptor) for (row,) in self.store.run(statement, group, *band)}
        for row in sorted(found):
            self.comparisons += 1
            same, value = self.likeness.compare(descriptor, self.descriptor(group, row) or b"")
            if same:
                yield Hit(group, row, value)


@dataclass(frozen=True)
class TestSets:
    """Data sets of which no copy is to be trained on.

    Args:
        sources: their rows, by name.
        likeness: what counts as the same.
    """

    __test__ = False  # no test of pytest's

    sources: Mapping[str, Source]
    likeness: Likeness

    @classmethod
    def open(cls, tests: Mapping[str, str], likeness: Likeness) -> "TestSets":
        """Open test sets, {"digits": "folder"} or {"digits": "folder::validation"}; the split is by default "test",
        and that of a single file "train".

        Raises:
            ValueError: one holds no rows or no images.
        """
        sources = {}
        for name, location in tests.items():
            folder, _, split = location.partition("::")
            sources[name] = open_source(folder, split or "test")
            sources[name].needs("image")
        return cls(sources, likeness)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decisions depend on."""
        sets = {name: source.settings | {"files": source.pins} for name, source in self.sources.items()}
        return {"likeness": self.likeness.settings, "sets": sets}

    @property
    def names(self) -> list[str]:
        """The names, in the order of their groups from 1 on."""
        return list(self.sources)

    def describe(self, near: Near) -> None:
        """Describe the rows of all sets, once in a run."""
        for group, (name, source) in enumerate(self.sources.items(), start=1):
            step = f"test set {name}"
            for number, shard in source.shards(near.store.done(step), TEST_ROWS):
                with near.store.step(step, number):
                    near.describe(group, [(row, source.media(values)) for row, values in shard])

    def hits(self, near: Near, descriptor: bytes) -> list[Hit]:
        """Return the rows of all test sets that are the same as a descriptor."""
        return [hit for group in range(1, len(self.sources) + 1) for hit in near.hits(group, descriptor)]
