"""Thermal images: one channel of infrared brightness."""

from typing import Any

import numpy as np

from hfvlm.media.depth import one_by_one, one_channel
from hfvlm.media.errors import MediaError
from hfvlm.media.sources import AllowUrls, check_finite, logger, name_of, read_batch

# The share of the range that all but one pixel in a hundred should have.
MIN_SHARE = 0.25


def read_thermals(
    sources: Any, *, limits: tuple[float, float] | None = None, allow_urls: AllowUrls = False
) -> list[np.ndarray]:
    """Read a batch of thermal images: a list, a generator, a column, or an array of (B, H, W). Anything else is a
    batch of one; see `read_thermal`."""
    return read_batch(read_thermal, one_by_one(sources), limits=limits, allow_urls=allow_urls)


def read_thermal(
    source: Any,
    *,
    limits: tuple[float, float] | None = None,
    allow_urls: AllowUrls = False,
    index: int | None = None,
) -> np.ndarray:
    """Read one thermal image -> `(H, W)`, float32, 0 for cold to 1 for hot.

    Models were trained on cameras' displays, 8 bits a pixel with hot in white. Counts of 16 bits and temperatures have
    to be fitted to that first: by default from the image's own lowest to its highest value, as cameras do.

    Example:
        >>> read_thermal("FLIR_00001.jpeg")  # 8 bits: as it is
        >>> read_thermal("FLIR_00001.tiff")  # 16 bits: from its lowest to its highest count
        >>> read_thermal(celsius, limits=(10, 40))  # an array of temperatures, the same scale for every image

    Args:
        source: an array or tensor of (H, W), (1, H, W) or (H, W, 1): `uint8`, 16-bit counts, floating point in 0..1,
            or, with `limits`, of any unit; a `.npy` file of one; an image with one channel of 8 or 16 bits or with
            equal channels, as a path, bytes, an open file, a `data:` URL, a PIL image, or a `datasets` row. Images
            in false colours are refused: a palette has no order.
        limits: the values that become 0 and 1; others are cut to them.
        allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts.
        index: position in a batch, for the error's message.

    Raises:
        MediaError: naming the input and what is wrong with it.
    """
    name = name_of("thermal image", source, index)
    array = one_channel(source, name, allow_urls)
    check_finite(array, name, "Cut those pixels out, or set them to the nearest measured value.")
    array = np.asarray(array)
    low, high = _own_limits(array, name) if limits is None else checked_limits(limits)
    return np.clip((array.astype(np.float32) - low) / max(high - low, 1e-12), 0, 1)


def checked_limits(limits: Any) -> tuple[float, float]:
    """Return two finite numbers, the coldest first.

    Raises:
        ValueError: they are something else.
    """
    try:
        low, high = (float(limit) for limit in limits)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not -np.inf < low < high < np.inf:
        raise ValueError(f"limits must be (coldest, hottest), not {str(limits)[:80]}.")
    return low, high


def _own_limits(array: np.ndarray, name: str) -> tuple[float, float]:
    low, high = float(array.min()), float(array.max())
    if array.dtype == np.uint8:
        return 0, 255
    if array.dtype.kind in "iu":
        _check_contrast(array, low, high, name)
        return low, high
    if low < 0 or high > 1:
        raise MediaError(
            f"{name}: floating-point values in {low:g}..{high:g}; pass 0..1, or the coldest and the hottest as limits."
        )
    return 0, 1


def _check_contrast(array: np.ndarray, low: float, high: float, name: str) -> None:
    """Warn where a few pixels, hot or dead ones, take most of the range, and leave little to all others."""
    few = max(1, array.size // 200)
    if array.size < 16:
        return
    values = np.partition(array.ravel(), (few, array.size - few - 1))
    inner = (float(values[few]), float(values[-few - 1]))
    if inner[1] - inner[0] < MIN_SHARE * (high - low):
        logger.warning(
            "%s: %d of %d pixels take the range from %g..%g to %g..%g, and the contrast of all others: pass "
            "limits=(%g, %g).",
            *(name, 2 * few, array.size, *inner, low, high, *inner),
        )
