"""Whatever names or holds a file, as an open one. What media readers share."""

import base64
import binascii
import importlib
import io
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch

from hfvlm.media import urls
from hfvlm.media.errors import MediaError

# False; True for every public host; or the names of the hosts.
AllowUrls: TypeAlias = bool | Collection[str]
THREADS = min(8, os.cpu_count() or 1)
MAX_ARRAY_BYTES = 2**30


def parallel(function: Any, items: list[Any]) -> list[Any]:
    """`map` on threads; Pillow, FFmpeg and NumPy release the interpreter while they work."""
    if len(items) < 2 or THREADS < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def read_batch(read: Callable[..., Any], batch: Iterable[Any], **options: Any) -> list[Any]:
    """Each source of a batch by `read`, which is told its place."""
    return parallel(lambda item: read(item[1], index=item[0], **options), list(enumerate(batch)))


def name_of(kind: str, source: Any, index: int | None) -> str:
    """What an error calls an input: its place in the batch, and its path, size or type."""
    place = "" if index is None else f"{kind} {index}: "
    if isinstance(source, str | os.PathLike):
        return place + str(source)[:200]
    if isinstance(source, Mapping) and source.get("path"):
        return place + str(source["path"])
    return place + (f"{len(source)} bytes" if isinstance(source, bytes) else type(source).__name__)


def fetched(source: Any, name: str, allow_urls: AllowUrls) -> Any:
    """A `data:` or an allowed `http(s)` URL, alone or in a `datasets` row, as the bytes behind it; else the source.

    Raises:
        MediaError: the URL is refused.
    """
    place = (None if source.get("bytes") else source.get("path")) if isinstance(source, Mapping) else source
    if isinstance(place, str) and ("://" in place[:16] or place.startswith("data:")):
        return _from_url(place, name, allow_urls)
    return source


@contextmanager
def opened(source: Any, name: str, allow_urls: AllowUrls) -> Iterator[BinaryIO | None]:
    """A path, bytes, an open file, a `data:` URL, an allowed `http(s)` URL, or a `datasets` row with one of these as
    "bytes" or "path", as an open file; None for anything else. What was open already stays open.

    Raises:
        MediaError: there is no such file, or the URL is refused.
    """
    source = fetched(source, name, allow_urls)
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str | os.PathLike):
        if not Path(source).is_file():
            raise MediaError(f"{name}: no such file.")
        with Path(source).open("rb") as file:
            yield file
    elif isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source)
    else:
        yield source if hasattr(source, "read") else None


def to_numpy(values: Any) -> np.ndarray:
    """A tensor, or what NumPy reads, as an array; NumPy has no bfloat16, which becomes float32."""
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    known = not values.is_floating_point() or values.dtype in (torch.float16, torch.float32, torch.float64)
    return (values if known else values.float()).numpy()


def read_array(source: Any, name: str) -> np.ndarray | None:
    """An array, a tensor, a nested list of numbers or a `.npy` file, as a NumPy array; None for anything else."""
    if isinstance(source, torch.Tensor):
        return to_numpy(source)
    if isinstance(source, np.ndarray):
        return source
    if isinstance(source, list | tuple):
        return np.asarray(source)
    with opened(source, name, allow_urls=False) as file:
        if file is None:
            return None
        start = file.tell()
        head = file.read(6)
        file.seek(start)
        if head != b"\x93NUMPY":
            return None
        data = file.read(MAX_ARRAY_BYTES + 1)
        if len(data) > MAX_ARRAY_BYTES:
            raise MediaError(f"{name}: more than {MAX_ARRAY_BYTES // 2**20} MiB. Cut it into parts.")
        try:
            return np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise MediaError(f"{name}: damaged or truncated array ({error}).") from error


def check_finite(array: np.ndarray, name: str, remedy: str) -> None:
    """Refuse arrays that are empty, hold no numbers, or hold NaN or infinity."""
    if array.size == 0:
        raise MediaError(f"{name}: is empty, shape {array.shape}.")
    if not np.issubdtype(array.dtype, np.number):
        raise MediaError(f"{name}: holds {array.dtype}, not numbers.")
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise MediaError(f"{name}: contains NaN or infinity. {remedy}")


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """An optional package, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module}: `pip install 'hfvlm[{extra}]'`.") from error


def _from_url(url: str, name: str, allow_urls: AllowUrls) -> bytes:
    if url.startswith("data:"):
        head, _, body = url.partition(",")
        if not head.endswith(";base64"):
            raise MediaError(f"{name}: only base64 data URLs are read.")
        try:
            return base64.b64decode(body, validate=True)
        except binascii.Error as error:
            raise MediaError(f"{name}: damaged base64 ({error}).") from error
    if not allow_urls:
        raise MediaError(f"{name}: URLs are refused. Download the file, or pass allow_urls=True or a set of hosts.")
    return urls.fetch(url, None if isinstance(allow_urls, bool) else allow_urls)
