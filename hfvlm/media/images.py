"""Images from paths, bytes, arrays and open files."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from hfvlm.media.errors import MediaError
from hfvlm.media.sources import AllowUrls, as_batch, from_tensor, logger, name_of, opened, read_batch, short

MAX_PIXELS = 89_478_485  # the number from which Pillow warns; more are refused
# Pillow reads more, but some of those formats run other programs (EPS) or are documents.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
MODES_OF_CHANNELS = (1, 3, 4)
ORIENTATION = 0x0112
# Tags of TIFF.
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281
# A 16-bit image of which no value reaches 12 bits is nearly black.
DARK_BELOW = 2**12


class ImageAsRead(Image.Image):
    """An image that `read_image` has read, in a form that transformers' `load_image` passes on as it is: it would
    convert it to RGB before the image processor resizes it. `read_image` takes the image out again."""

    def __init__(self, image: Image.Image):
        super().__init__()
        self.image = image
        self.im, self._mode, self._size = image.im, "RGB", image.size

    def load(self) -> Any:
        return self.image.load()

    def getexif(self) -> Image.Exif:
        return Image.Exif()

    def copy(self) -> "ImageAsRead":
        return self

    def convert(self, mode: str | None = None, **options: Any) -> Image.Image:  # type: ignore[override]
        """Return this image itself for RGB, to which transformers converts; other modes are made of the image."""
        return self if mode == "RGB" and not options else self.image.convert(mode, **options)


def image_batch(sources: Any) -> list[Any]:
    """Return a batch of images as single sources: as `as_batch`, a tuple, or an array of (B, ...)."""
    if isinstance(sources, tuple):
        return list(sources)
    if isinstance(sources, np.ndarray | torch.Tensor) and sources.ndim == 4:
        return list(sources)
    return as_batch(sources)


def read_images(
    sources: Any, *, upright: bool = True, allow_urls: AllowUrls = False, bits: int | None = None
) -> list[Image.Image]:
    """Read a batch of images, on several threads. One source is a batch of one; see `read_image`."""
    return read_batch(read_image, image_batch(sources), upright=upright, allow_urls=allow_urls, bits=bits)


def read_image(
    source: Any,
    *,
    upright: bool = True,
    bits: int | None = None,
    allow_urls: AllowUrls = False,
    index: int | None = None,
    name: str | None = None,
) -> Image.Image:
    """Read one image, decoded, upright, in its own mode.

    Cameras store an image as their sensor lies, and in EXIF how to turn it. It is turned here, as viewers do, whether
    it comes as a file or as a PIL image.

    Args:
        source: a path; bytes; an open binary file; a `data:` URL; a `PIL.Image`; a `datasets` row with "bytes" or
            "path"; or an array or tensor of (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, `uint8` in 0..255
            or floating point in 0..1.
        upright: False leaves pixels as they are stored; EXIF stays with the image.
        bits: used bits of a 16-bit image whose file does not define them: with 12, white is 4095.
        allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts.
        index: position in a batch, for the error's message.
        name: in errors; by default the position, path, size or type.

    Raises:
        MediaError: naming the input and what is wrong with it.
    """
    if isinstance(source, ImageAsRead):
        source = source.image
    name = name or name_of("image", source, index)
    if isinstance(source, Image.Image):
        image = decoded_by(lambda: _decoded(source, name), name)
    elif isinstance(source, np.ndarray | torch.Tensor):
        return array_to_image(source, name)
    else:
        image = _from_file(source, name, allow_urls, bits)
    if bits is not None:
        image = _widened(image, bits, name)
    return turned(image) if upright else image


def image_format(path: Path) -> str:
    """Return the format of a new image's file, as "PNG", by the end of its name.

    Raises:
        ValueError: no image can be written by it.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(
            f"{path}: {path.suffix or 'no ending'} is no kind of image that can be written; end it in .png."
        )
    return str(kind)


def decoded_by(read: Callable[[], Any], name: str) -> Any:
    """Return the result of `read`, and raise whatever Pillow raises for hostile bytes as a MediaError."""
    try:
        return read()
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: not an image in one of the formats {', '.join(FORMATS)}.") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name}: {short(error)}") from error
    except Exception as error:
        raise MediaError(f"{name}: damaged or truncated image ({short(error) or type(error).__name__}).") from error


def _from_file(source: Any, name: str, allow_urls: AllowUrls, bits: int | None) -> Image.Image:
    with opened(source, name, allow_urls) as file:
        if file is None:
            raise MediaError(f"{name}: an image is a path, bytes, an open file, an array, a tensor or a PIL image.")
        image = open_image(file, name)
        if bits is None and image.mode.startswith("I;16") and (used := _bits_used(image, file)) is not None:
            image = _widened(image, used, name)
        elif bits is None:
            _check_brightness(image, name)
        return image


def open_image(file: BinaryIO, name: str) -> Image.Image:
    """Decode an open file's image, its values as they are stored."""
    return decoded_by(lambda: _decoded(Image.open(file, formats=FORMATS), name), name)


def _decoded(image: Image.Image, name: str) -> Image.Image:
    _check_pixels(*image.size, name)
    image.load()
    return image


def _check_pixels(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name}: {width} x {height} pixels; more than {MAX_PIXELS} are refused. Scale it down first."
        )
    if width * height == 0:
        raise MediaError(f"{name}: {width} x {height} pixels: the image is empty.")


def turned(image: Image.Image) -> Image.Image:
    """Turn an image upright. EXIF that cannot be read is ignored."""
    try:
        if image.getexif().get(ORIENTATION, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow parses EXIF, which may hold anything
        return image


# Bits: 16-bit files often hold 10, 12 or 14.


def _bits_used(image: Image.Image, file: BinaryIO) -> int | None:
    """Return the used bits that a 16-bit file defines, where they are fewer than 16."""
    if image.format == "PNG":
        return _png_bits(file)
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return None
    bits, most = tags.get(BITS_PER_SAMPLE, (16,)), tags.get(MAX_SAMPLE_VALUE, (65535,))
    used, most = (int(value[0] if isinstance(value, tuple) else value) for value in (bits, most))
    if 8 < used < 16:
        return used
    return most.bit_length() if 255 < most < 2**15 and np.asarray(image).max() <= most else None


def _png_bits(file: BinaryIO) -> int | None:
    """Read the bits of the first channel from a PNG's sBIT chunk."""
    file.seek(8)
    for _ in range(64):
        head = file.read(8)
        size = int.from_bytes(head[:4], "big")
        if len(head) < 8 or head[4:] == b"IDAT" or size > 2**20:
            return None
        data = file.read(size + 4)
        if head[4:] == b"sBIT":
            return data[0] if data and 8 < data[0] < 16 else None
    return None


def _widened(image: Image.Image, bits: int, name: str) -> Image.Image:
    """Scale a 16-bit image of which `bits` are used, so that white is 65535."""
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be in 1..16, not {bits}.")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    low = values & (1 << 16 - bits) - 1
    if image.format == "PNG" and ((low == 0) | (low == values >> bits)).all():
        return image  # scaled to all 16 bits, as PNG requires
    if values.max() >= 2**bits:
        raise MediaError(f"{name}: values up to {values.max()} have more than {bits} bits.")
    scaled = Image.fromarray((values.astype(np.uint32) * 65535 // (2**bits - 1)).astype(np.uint16))
    scaled.info = dict(image.info)
    return scaled


def _check_brightness(image: Image.Image, name: str) -> None:
    if not image.mode.startswith("I;16"):
        return
    most = int(np.asarray(image).max())
    if 255 < most < DARK_BELOW:
        logger.warning(
            "%s: a 16-bit image with values up to %d is nearly black. If its white is %d, pass "
            "hfvlm.media.read_image(source, bits=%d).",
            *(name, most, 2 ** most.bit_length() - 1, most.bit_length()),
        )


# Arrays


def array_to_image(array: Any, name: str) -> Image.Image:
    """Convert `(H, W)`, `(H, W, C)` or `(C, H, W)`; see `read_image`. `(3, W, 3)` is read as channels last.

    Raises:
        MediaError: the shape or the values are no image's, or either end of the shape may be the channels.
    """
    array = from_tensor(array) if isinstance(array, torch.Tensor) else array
    if np.ma.is_masked(array):
        raise MediaError(f"{name}: contains masked values; fill them first.")
    array = np.asarray(array)
    if array.ndim == 3 and _is_ambiguous(array.shape[0], array.shape[-1]):
        raise MediaError(
            f"{name}: shape {array.shape} may be (H, W, C) or (C, H, W); pass it as a PIL image, "
            "Image.fromarray(array)."
        )
    if array.ndim == 3 and array.shape[-1] not in MODES_OF_CHANNELS and array.shape[0] in MODES_OF_CHANNELS:
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise MediaError(f"{name}: shape {array.shape} is not (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels.")
    _check_pixels(array.shape[1], array.shape[0], name)
    return Image.fromarray(np.ascontiguousarray(_to_bytes(array, name)))


def _is_ambiguous(first: int, last: int) -> bool:
    return first in MODES_OF_CHANNELS and last in (1, 4) and (first, last) != (1, 1)


def _to_bytes(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise MediaError(f"{name}: holds {array.dtype}, not real numbers.")
    floating = np.issubdtype(array.dtype, np.floating)
    if floating and not np.isfinite(array).all():
        raise MediaError(f"{name}: contains NaN or infinity.")
    low, high = array.min(), array.max()
    if low < 0 or high > (1 if floating else 255):
        kind = "floating-point values" if floating else "integers"
        raise MediaError(f"{name}: {kind} in {low:g}..{high:g}; pass 0..1 as floating point or 0..255 as integers.")
    return (np.rint(array * 255) if floating else array).astype(np.uint8)


# Modes


def to_8_bits(image: Image.Image, name: str = "image") -> Image.Image:
    """Convert modes whose conversion to RGB would clip or lose their content to a mode whose does not.

    16-bit grey becomes 8-bit grey by its high byte, where the originals' `convert("RGB")` turns most of it white.

    Raises:
        MediaError: the values fit neither 8 nor 16 bits, or the mode has no conversion.
    """
    if image.mode in ("PA", "La", "RGBa"):
        return image.convert({"PA": "RGBA", "La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode == "LAB":
        return decoded_by(lambda: _from_lab(image), name)
    if image.mode.startswith("I"):
        return _from_integers(image, name)
    if image.mode == "F":
        low, high = np.asarray(image).min(), np.asarray(image).max()
        if not (low >= 0 and high <= 255) or 0 < high <= 1:
            raise MediaError(f"{name}: floating-point image with values in {low:g}..{high:g}; scale it to 0..255.")
    return image


def _from_integers(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise MediaError(f"{name}: integers in {low}..{high} fit neither 8 nor 16 bits; scale them to 0..255 first.")
    return Image.fromarray((values >> 8 if high > 255 else values).astype(np.uint8))


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
    transform = ImageCms.buildTransform(*profiles, "LAB", "RGB")
    return ImageCms.applyTransform(image, transform) or image


# Portable grey maps, whose values Pillow stretches to 16 bits.

HEADER = re.compile(rb"P([25])" + 3 * rb"(?:\s|#[^\n\r]*[\n\r])+(\d{1,9})" + rb"\s")


def grey_map(file: BinaryIO, name: str) -> np.ndarray | None:
    """Read the integers of a PGM file, `(H, W)`, as they are stored; None for other files."""
    file.seek(0)
    head = file.read(4096)
    file.seek(0)
    found = HEADER.match(head)
    if found is None:
        return None
    kind, width, height, most = (int(found[i]) for i in range(1, 5))
    _check_pixels(width, height, name)
    if not 0 < most < 65536:
        raise MediaError(f"{name}: a largest value of {most} is none; it must be in 1..65535.")
    file.seek(found.end())
    dtype = np.dtype(np.uint8 if most < 256 else ">u2")
    if kind == 5:
        data = file.read(width * height * dtype.itemsize)
        if len(data) < width * height * dtype.itemsize:
            raise MediaError(f"{name}: damaged or truncated image ({len(data)} bytes of {width} x {height} pixels).")
        return np.frombuffer(data, dtype).reshape(height, width).astype(dtype.newbyteorder("="))
    return _plain_grey_map(file.read(width * height * 12), (height, width), dtype, name)


def _plain_grey_map(text: bytes, shape: tuple[int, int], dtype: np.dtype, name: str) -> np.ndarray:
    try:
        values = np.array(text.split()[: shape[0] * shape[1]], dtype=np.int64)
        return values.astype(dtype.newbyteorder("=")).reshape(shape)
    except (ValueError, OverflowError) as error:
        raise MediaError(f"{name}: damaged or truncated image ({short(error)}).") from error
