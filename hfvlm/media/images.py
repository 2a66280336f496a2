"""Pictures from paths, bytes, arrays and open files."""

from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from hfvlm.media.errors import MediaError
from hfvlm.media.sources import AllowUrls, name_of, opened, read_batch, to_numpy

MAX_PIXELS = 89_478_485  # Pillow warns from here on; here it is the end
# Pillow reads more, but some of those formats run other programs (EPS) or are documents.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")


def read_images(sources: Any, *, allow_urls: AllowUrls = False) -> list[Image.Image]:
    """A batch of pictures, decoded on several threads. One source is a batch of one; see `read_image`."""
    batch = list(sources) if isinstance(sources, list | tuple) else [sources]
    if isinstance(sources, np.ndarray | torch.Tensor) and sources.ndim == 4:
        batch = list(sources)
    return read_batch(read_image, batch, allow_urls=allow_urls)


def read_image(
    source: Any, *, allow_urls: AllowUrls = False, index: int | None = None, name: str | None = None
) -> Image.Image:
    """One picture, decoded, in its own mode.

    Args:
        source: a path; bytes; an open binary file; a `data:` URL; a `PIL.Image`; a `datasets` row with "bytes" or
            "path"; or an array or tensor of (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, `uint8` in 0..255
            or floating point in 0..1.
        allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts.
        index: position in a batch, for the error's message.
        name: what the error calls it; by default its place, path, size or type.

    Raises:
        MediaError: naming the input and what is wrong with it.
    """
    name = name or name_of("image", source, index)
    try:
        return _read(source, name, allow_urls)
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: not a picture in one of the formats {', '.join(FORMATS)}.") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name}: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise MediaError(f"{name}: damaged or truncated picture ({error}).") from error


def _read(source: Any, name: str, allow_urls: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return _decoded(source, name)
    if isinstance(source, np.ndarray | torch.Tensor):
        return array_to_image(source, name)
    with opened(source, name, allow_urls) as file:
        if file is None:
            raise MediaError(f"{name}: a picture is a path, bytes, an open file, an array, a tensor or a PIL image.")
        return _decoded(Image.open(file, formats=FORMATS), name)


def _decoded(image: Image.Image, name: str) -> Image.Image:
    _check_pixels(*image.size, name)
    image.load()
    return image


def _check_pixels(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name}: {width} x {height} pixels; more than {MAX_PIXELS} are refused. Scale it down first."
        )


def array_to_image(array: Any, name: str) -> Image.Image:
    """(H, W), (H, W, C) or (C, H, W), see `read_image`. Three rows of three channels are read as channels last."""
    array = to_numpy(array)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise MediaError(f"{name}: shape {array.shape} is not (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels.")
    _check_pixels(array.shape[1], array.shape[0], name)
    return Image.fromarray(np.ascontiguousarray(_to_bytes(array, name)))


def _to_bytes(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    floating = np.issubdtype(array.dtype, np.floating)
    if floating and not np.isfinite(array).all():
        raise MediaError(f"{name}: contains NaN or infinity.")
    low, high = array.min(), array.max()
    if low < 0 or high > (1 if floating else 255):
        kind = "floating-point values" if floating else "integers"
        raise MediaError(f"{name}: {kind} in {low:g}..{high:g}; pass 0..1 as floating point or 0..255 as integers.")
    return (np.rint(array * 255) if floating else array).astype(np.uint8)


def to_8_bits(image: Image.Image, name: str = "image") -> Image.Image:
    """Modes whose conversion to RGB would clip or lose their content, as a mode whose does not.

    16-bit grey becomes 8-bit grey by its high byte, where the originals' `convert("RGB")` turns most of it white.
    """
    if image.mode in ("PA", "La"):
        return image.convert({"PA": "RGBA", "La": "LA"}[image.mode])
    if image.mode.startswith("I"):
        values = np.asarray(image)
        return (
            Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8)) if values.max() > 255 else image.convert("L")
        )
    if image.mode == "F":
        low, high = np.asarray(image).min(), np.asarray(image).max()
        if not (low >= 0 and high <= 255) or 0 < high <= 1:
            raise MediaError(f"{name}: floating-point picture with values in {low:g}..{high:g}; scale it to 0..255.")
    return image
