"""Sources of media: paths, bytes, URLs and rows as open files, batches and arrays. All media readers share it."""

import base64
import binascii
import importlib
import io
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import unquote_to_bytes

import numpy as np
import torch

from hfvlm.media import urls
from hfvlm.media.errors import MediaError

# False; True for every public host; or the names of the hosts.
AllowUrls: TypeAlias = bool | Collection[str]
THREADS = min(8, os.cpu_count() or 1)
MAX_ARRAY_BYTES = 2**30
MAX_STREAM_BYTES = 2**31
MAX_TEXT = 200

logger = logging.getLogger("hfvlm.media")


def parallel(function: Any, items: list[Any]) -> list[Any]:
    """Map a function on threads; Pillow, FFmpeg and NumPy release the interpreter while they work."""
    if len(items) < 2 or THREADS < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def as_batch(sources: Any) -> list[Any]:
    """Return a batch as a list: a list, a generator, a pandas Series, an array of objects or of texts, or a column of
    `datasets`; anything else, a tuple included, is a batch of one."""
    if isinstance(sources, list):
        return sources
    if isinstance(sources, np.ndarray):
        return sources.tolist() if sources.dtype.kind in "OUS" and sources.ndim == 1 else [sources]
    if isinstance(sources, Iterator) and not hasattr(sources, "read"):
        return list(sources)
    if type(sources).__module__.partition(".")[0] in ("pandas", "datasets", "pyarrow") and hasattr(
        sources, "__getitem__"
    ):
        return _column(sources)
    return [sources]


def _column(sources: Any) -> list[Any]:
    if hasattr(sources, "columns") or isinstance(sources, Mapping):
        return [sources]  # a table is one source
    return list(getattr(sources, "to_list", getattr(sources, "to_pylist", lambda: list(sources)))())


def read_batch(read: Callable[..., Any], batch: Iterable[Any], **options: Any) -> list[Any]:
    """Read each source of a batch by `read`, which is given its position."""
    return parallel(lambda item: read(item[1], index=item[0], **options), list(enumerate(batch)))


def short(text: Any, most: int = MAX_TEXT) -> str:
    """Shorten a text of a file or a decoder for a message: on one line, printable, and not long."""
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text)[: most + 1])
    return printable if len(printable) <= most else printable[: most - 3] + "..."


def name_of(kind: str, source: Any, index: int | None) -> str:
    """Return the name of an input in errors: its position in the batch, and its path, size or type."""
    position = "" if index is None else f"{kind} {index}: "
    if isinstance(source, Mapping) and isinstance(source.get("path"), str | os.PathLike):
        source = source["path"]
    if isinstance(source, str | os.PathLike):
        return position + short(source)
    return position + (f"{len(source)} bytes" if isinstance(source, bytes) else type(source).__name__)


def fetched(source: Any, name: str, allow_urls: AllowUrls) -> Any:
    """Return the bytes behind a `data:` or an allowed `http(s)` URL, also of a `datasets` row; else the source.

    Raises:
        MediaError: the URL is refused.
    """
    path = (None if source.get("bytes") else source.get("path")) if isinstance(source, Mapping) else source
    if isinstance(path, str) and ("://" in path[:16] or path.startswith("data:")):
        return _from_url(path, name, allow_urls)
    return source


@contextmanager
def opened(source: Any, name: str, allow_urls: AllowUrls) -> Iterator[BinaryIO | None]:
    """Open a path, bytes, an open file, a `data:` URL, an allowed `http(s)` URL, or a `datasets` row with one of these
    as "bytes" or "path", at its start; None for anything else. A file that was open already stays open.

    Raises:
        MediaError: there is no such file, it cannot be opened, or the URL is refused.
    """
    source = fetched(source, name, allow_urls)
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str | os.PathLike):
        with _open(source, name) as file:
            yield file
    elif isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source)
    else:
        yield _rewound(source, name) if hasattr(source, "read") else None


def _open(path: str | os.PathLike[str], name: str) -> BinaryIO:
    try:
        if Path(path).is_dir():
            raise MediaError(f"{name}: is a folder; pass the files in it.")
        if not Path(path).is_file():
            raise MediaError(f"{name}: no such file.")
        return Path(path).open("rb")
    except (OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{name}: cannot be opened ({short(error)}).") from error


def _rewound(file: Any, name: str) -> BinaryIO:
    """Rewind an open file; read one that cannot be rewound into memory."""
    try:
        if getattr(file, "seekable", lambda: True)() and hasattr(file, "seek"):
            file.seek(0)
            data = file.read(0)
        else:
            data = file.read(MAX_STREAM_BYTES + 1)
            file = io.BytesIO(data) if isinstance(data, bytes) else file
    except (OSError, ValueError) as error:
        raise MediaError(f"{name}: the open file cannot be read ({short(error)}).") from error
    if not isinstance(data, bytes):
        raise MediaError(f"{name}: the file is open as text; open it with mode 'rb'.")
    if len(data) > MAX_STREAM_BYTES:
        raise MediaError(f"{name}: more than {MAX_STREAM_BYTES // 2**20} MiB. Pass the file's path.")
    return file


def from_tensor(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor of any device and type as an array; bfloat16 and 8-bit floating point, which NumPy lacks, as
    float32."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.is_sparse or tensor.is_quantized:
        tensor = tensor.to_dense() if tensor.is_sparse else tensor.dequantize()
    if tensor.dtype == torch.bfloat16 or (tensor.is_floating_point() and tensor.element_size() == 1):
        tensor = tensor.float()
    return tensor.numpy()


def read_array(source: Any, name: str) -> np.ndarray | None:
    """Read an array, a tensor, a nested list of numbers or a `.npy` file as a NumPy array; None for anything else.

    Masked arrays stay masked.
    """
    if isinstance(source, torch.Tensor):
        return from_tensor(source)
    if isinstance(source, list | tuple):
        return _from_list(source, name)
    if isinstance(source, np.ndarray) or hasattr(source, "to_numpy"):
        return source if isinstance(source, np.ndarray) else np.asarray(source.to_numpy())
    with opened(source, name, allow_urls=False) as file:
        if file is None:
            return None
        head = file.read(6)
        file.seek(0)
        if head != b"\x93NUMPY":
            return None
        data = file.read(MAX_ARRAY_BYTES + 1)
        if len(data) > MAX_ARRAY_BYTES:
            raise MediaError(f"{name}: more than {MAX_ARRAY_BYTES // 2**20} MiB. Cut it into parts.")
        return _from_npy(data, name)


def _from_list(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray([from_tensor(v) if isinstance(v, torch.Tensor) else v for v in values])
    except (ValueError, TypeError) as error:
        raise MediaError(f"{name}: a list of unequal lengths or of no numbers ({short(error)}).") from error


def _from_npy(data: bytes, name: str) -> np.ndarray:
    """Read the array of a `.npy` file, and allocate no more memory than the file has bytes."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(stream, max_header_size=2**16)
        size = dtype.itemsize
        for edge in shape:
            size *= int(edge)
        if size != len(data) - stream.tell() or size < 0:
            raise ValueError(f"shape {shape} of {dtype} is not of {len(data) - stream.tell()} bytes")
        stream.seek(0)
        return np.load(stream, allow_pickle=False)
    except Exception as error:  # NumPy evaluates a header that may hold anything
        raise MediaError(f"{name}: damaged or truncated array ({short(error)}).") from error


def check_finite(array: np.ndarray, name: str, remedy: str) -> None:
    """Refuse arrays that are empty, hold no numbers, or hold NaN, infinity or masked values."""
    if array.size == 0:
        raise MediaError(f"{name}: is empty, shape {array.shape}.")
    if not np.issubdtype(array.dtype, np.number) or np.issubdtype(array.dtype, np.complexfloating):
        raise MediaError(f"{name}: holds {array.dtype}, not real numbers.")
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise MediaError(f"{name}: contains NaN or infinity. {remedy}")
    if np.ma.is_masked(array):
        raise MediaError(f"{name}: contains masked values. {remedy}")


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or raise an ImportError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module}: `pip install 'hfvlm[{extra}]'`.") from error


def _from_url(url: str, name: str, allow_urls: AllowUrls) -> bytes:
    if url.startswith("data:"):
        head, _, body = url.partition(",")
        if not head.rstrip().endswith(";base64"):
            raise MediaError(f"{name}: only base64 data URLs are read.")
        try:
            # Mail and many encoders break lines at 76 columns; URLs may escape what is not alphanumeric.
            return base64.b64decode(b"".join(unquote_to_bytes(body).split()), validate=True)
        except binascii.Error as error:
            raise MediaError(f"{name}: damaged base64 ({error}).") from error
    if not allow_urls:
        raise MediaError(f"{name}: URLs are refused. Download the file, or pass allow_urls=True or a set of hosts.")
    return urls.fetch(url, None if isinstance(allow_urls, bool) else allow_urls)
