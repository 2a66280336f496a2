"""Descriptors of images by which copies are found that were scaled, compressed or filtered a little."""

import numpy as np
from PIL import Image

from hfvlm.media.images import to_8_bits

# The lowest frequencies of an image of EDGE x EDGE pixels that a hash is made of, and the edge of its thumbnail.
EDGE, FREQUENCIES, THUMBNAIL = 32, 8, 4
BITS = FREQUENCIES**2
HASH_BYTES = BITS // 8


def _cosines() -> np.ndarray:
    """Return the first rows of the discrete cosine transform, (FREQUENCIES, EDGE)."""
    frequencies, places = np.arange(FREQUENCIES)[:, None], np.arange(EDGE)[None]
    return np.cos(np.pi * (2 * places + 1) * frequencies / (2 * EDGE)).astype(np.float32)


COSINES = _cosines()


def describe(image: Image.Image) -> bytes:
    """Describe an image: 64 bits of its lowest frequencies, then a thumbnail of 4 x 4 colours.

    A bit is whether a coefficient of the discrete cosine transform of the grey image is above their median, as in
    pHash (C. Zauner, Implementation and benchmarking of perceptual image hash functions, 2010).
    """
    colours = to_8_bits(image).convert("RGB")
    grey = np.asarray(colours.convert("L").resize((EDGE, EDGE), Image.Resampling.BOX), np.float32)
    coefficients = COSINES @ grey @ COSINES.T
    coefficients[0, 0] = 0  # the mean, which the thumbnail has
    bits = coefficients > np.median(coefficients)
    small = np.asarray(colours.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    return np.packbits(bits).tobytes() + small.tobytes()


def differing_bits(one: bytes, other: bytes) -> int:
    """Count the bits in which two hashes differ."""
    a, b = (int.from_bytes(each[:HASH_BYTES], "big") for each in (one, other))
    return (a ^ b).bit_count()


def colour_difference(one: bytes, other: bytes) -> float:
    """Return the mean difference of two thumbnails, from 0 to 255."""
    a, b = (np.frombuffer(each, np.uint8, offset=HASH_BYTES).astype(np.int16) for each in (one, other))
    return float(np.abs(a - b).mean())
