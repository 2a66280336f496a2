"""Depth maps: how far away each pixel is."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from hfvlm.media.errors import MediaError
from hfvlm.media.images import MAX_PIXELS, decoded_by, grey_map, open_image, turned
from hfvlm.media.sources import (
    AllowUrls,
    as_batch,
    check_finite,
    fetched,
    logger,
    name_of,
    opened,
    read_array,
    read_batch,
)

MAX_METRES = 1000.0
# Times a model's farthest depth at which a map is in other units.
FAR_BEYOND = 5
# GeoTIFF's tag with the value of pixels that were not measured.
NO_DATA = 42113


def _sun_rgbd(values: np.ndarray) -> np.ndarray:
    """Follow the dataset's toolbox: millimetres with their bits rotated by three, and nothing beyond 8 m."""
    values = values.astype(np.uint16)
    return np.minimum(((values >> 3) | (values << 13)).astype(np.float32) / 1000, 8)


# Units of a file's integers.
ENCODINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "millimetres": lambda values: values.astype(np.float32) / 1000,
    "sun_rgbd": _sun_rgbd,
    "kitti": lambda values: values.astype(np.float32) / 256,
    "tum": lambda values: values.astype(np.float32) / 5000,
}


def read_depths(sources: Any, *, encoding: str = "millimetres", allow_urls: AllowUrls = False) -> list[np.ndarray]:
    """Read a batch of depth maps: a list, a generator, a column, or an array of (B, H, W). Anything else is a batch of
    one; see `read_depth`."""
    return read_batch(read_depth, one_by_one(sources), encoding=encoding, allow_urls=allow_urls)


def read_depth(
    source: Any,
    *,
    encoding: str = "millimetres",
    allow_urls: AllowUrls = False,
    index: int | None = None,
) -> np.ndarray:
    """Read one depth map -> `(H, W)`, float32, in metres; 0 where nothing was measured.

    Depth is the distance to the plane of the camera, as sensors give it, not its inverse and not the length of a ray.

    Example:
        >>> read_depth(np.full((480, 640), 1.5))  # metres, as floating point
        >>> read_depth(np.full((480, 640), 1500, np.uint16))  # millimetres, as integers
        >>> read_depth("frame-0001.depth.png")  # 16 bits a pixel, millimetres: RealSense, Kinect, Azure, ScanNet
        >>> read_depth("0000103.png", encoding="sun_rgbd")

    Args:
        source: an array or tensor of (H, W), (1, H, W) or (H, W, 1), floating point in metres or integers in
            `encoding`; a `.npy` file of one; a PNG or TIFF with one channel of 16 bits (in `encoding`) or of floating
            point (in metres), or a PGM of two bytes a pixel, as a path, bytes, an open file, a `data:` URL, a PIL
            image, or a `datasets` row. Masked values of NumPy's masked arrays count as not measured.
        encoding: unit of integers: "millimetres"; "sun_rgbd", SUN RGB-D's files; "kitti", metres times 256; "tum",
            metres times 5000.
        allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts.
        index: position in a batch, for the error's message.

    Raises:
        MediaError: naming the input and what is wrong with it.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, not {encoding!r}.")
    name = name_of("depth map", source, index)
    array = one_channel(source, name, allow_urls)
    if isinstance(array, np.ma.MaskedArray):
        array = array.filled(0)
    if array.dtype.kind in "iu" and array.dtype.itemsize > 1:
        if array.min() < 0 or array.max() > 65535:
            raise MediaError(f"{name}: integers in {array.min()}..{array.max()}; depth maps hold 16 bits a pixel.")
        array = ENCODINGS[encoding](array)
    elif array.dtype.kind != "f":
        raise MediaError(
            f"{name}: {array.dtype} holds no distances; it is an image of a depth map. Pass metres as floating "
            "point, or the sensor's 16-bit file."
        )
    check_finite(array, name, "Set pixels without a measurement to 0.")
    if array.min() < 0 or array.max() > MAX_METRES:
        raise MediaError(
            f"{name}: {array.min():g}..{array.max():g} m is no depth in metres; at most {MAX_METRES:g} are read. "
            "Pass millimetres as integers."
        )
    return np.ascontiguousarray(array, dtype=np.float32)


def check_order(nearest: float, farthest: float | None, owner: str) -> None:
    """Refuse settings of a depth reader whose nearest metres are not less than its farthest."""
    if farthest and nearest >= farthest:
        raise ValueError(f"{owner}: nearest must be less than farthest, {farthest:g} m.")


def check_range(metres: np.ndarray, farthest: float, name: str) -> None:
    """Warn of a depth map that lies mostly beyond what a model was trained on, and refuse one that lies far beyond.

    Raises:
        MediaError: every depth is beyond five times `farthest`, as in a map in other units than metres.
    """
    measured = metres[metres > 0]
    if not farthest or not measured.size or np.median(measured) <= farthest:
        return
    values = f"{measured.min():g}..{measured.max():g} m"
    if measured.min() > FAR_BEYOND * farthest:
        raise MediaError(
            f"{name}: depths in {values}, far beyond the {farthest:g} m that the model knows: pass metres, or set "
            "farthest."
        )
    logger.warning(
        "%s: depths in %s: most are beyond the %g m that the model knows, and are cut to it. Is the map in metres?",
        *(name, values, farthest),
    )


def one_by_one(sources: Any) -> list[Any]:
    """Return a batch of sources with one channel as single ones: a list, a generator, a column, or an array of
    (B, H, W). Anything else is a batch of one."""
    if getattr(sources, "ndim", 2) > 2 and 1 not in (sources.shape[0], sources.shape[-1]):
        return list(sources)
    return as_batch(sources)


def one_channel(source: Any, name: str, allow_urls: AllowUrls) -> np.ndarray:
    """Read the values of a sensor with one channel, as they are stored, upright, `(H, W)`."""
    source = fetched(source, name, allow_urls)
    array = None if isinstance(source, Image.Image) else read_array(source, name)
    if array is None:
        array = _stored(source, name)
    array = np.squeeze(array, axis=tuple(axis for axis in (0, -1) if array.ndim == 3 and array.shape[axis] == 1)[:1])
    if array.ndim != 2 or array.size == 0:
        raise MediaError(f"{name}: shape {array.shape} is not (H, W), (1, H, W) or (H, W, 1).")
    if array.size > MAX_PIXELS:
        raise MediaError(f"{name}: {array.size} pixels; more than {MAX_PIXELS} are refused. Scale it down first.")
    return array


def _stored(source: Any, name: str) -> np.ndarray:
    """Read a file's or a PIL image's values."""
    if isinstance(source, Image.Image):
        tiles = getattr(source, "tile", None)
        if source.format == "PPM" and source.mode == "I" and (not tiles or tiles[0][0] != "raw"):
            raise MediaError(f"{name}: Pillow stretches the values of a PGM; pass its path or bytes.")
        decoded_by(source.load, name)
        return _values(source, name)
    with opened(source, name, allow_urls=False) as file:
        if file is None:
            raise MediaError(f"{name}: an image is a path, bytes, an open file, an array, a tensor or a PIL image.")
        found = grey_map(file, name)
        return _values(open_image(file, name), name) if found is None else found


def _values(image: Image.Image, name: str) -> np.ndarray:
    missing = _no_data(image)
    image = turned(image)
    if image.mode not in ("L", "F", "I") and not image.mode.startswith("I;16"):
        image = _grey(image, name)
    array = np.asarray(image)
    return array if missing is None else np.ma.masked_equal(array, missing)


def _no_data(image: Image.Image) -> float | None:
    """Return the value of pixels without a measurement, where a TIFF names one."""
    try:
        return float(str(getattr(image, "tag_v2", {})[NO_DATA]).strip("\0 "))
    except (KeyError, ValueError):
        return None


def _grey(image: Image.Image, name: str) -> Image.Image:
    """Return one channel of an image whose channels are equal, as cameras without colour often store them."""
    values = np.asarray(decoded_by(lambda: image.convert("RGB"), name)).astype(np.int16)
    # JPEG blurs even what has no colour by a few levels.
    if (values.max(axis=-1) - values.min(axis=-1)).max() > 8:
        raise MediaError(
            f"{name}: is in colours, in which the sensor's values are lost. Pass the single-channel file that the "
            "colours were made from."
        )
    return image.convert("L")
