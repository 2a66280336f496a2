"""Reads the tensors of a released file without running anything that is in it.

safetensors, PyTorch's zip files (`.pt .pth .bin`), TorchScript archives, NumPy's `.npz`, TensorFlow's checkpoints, and
folders of shards. The format is told by content, never by name. Tensors of the first three, and TensorFlow's, stay in
the file until they are used.
"""

import argparse
import io
import json
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# The end of every table of LevelDB's kind, such as TensorFlow's index.
TABLE_END = struct.pack("<Q", 0xDB4775248B80FB57)
# Packages whose checkpoints were released as whole pickled modules alone.
_MODULE_PACKAGES = ("dall_e.",)
# What such a module keeps its state in.
_MEMBERS = ("_parameters", "_buffers", "_modules")
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


class CheckpointError(ValueError):
    """A file that cannot be read, or that holds what a checkpoint has no use for."""


@dataclass
class Checkpoint:
    """The tensors of a file, by the names the authors gave them, and whatever else was stored beside them."""

    tensors: Mapping[str, Tensor]
    extras: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Open a released file, or a folder that holds one.

    Wrappers (`state_dict`, `model`, ...) are opened and a common `module.` prefix is dropped.

    Raises:
        FileNotFoundError: there is no such file, or no weights in the folder.
        CheckpointError: the file is damaged, or asks for code to be run; it says which.
    """
    path = Path(source)
    if path.is_dir():
        path = weights_in(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"PK"):
        return _read_zip(path)
    if len(head) > 8 and head[8:9] == b"{":
        return Checkpoint(_read_safetensors(path))
    if head.startswith((b"\x80\x02\x8a\x0al\xfc\x9cF", b"ustar")) or b"ustar" in head:
        return _read_legacy(path)
    return _read_bundle(path, head)


def _read_bundle(path: Path, head: bytes) -> Checkpoint:
    """TensorFlow's index, which is told by its end; what is not even that is refused."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, len(TABLE_END)), io.SEEK_END)
        tail = file.read()
    if tail == TABLE_END:
        from hfvlm.tensor_bundle import TensorBundle

        return Checkpoint(TensorBundle(path))
    if head.startswith(b"\x80"):
        raise CheckpointError(f"{path}: a bare pickle, not a checkpoint; nothing was read from it.")
    raise CheckpointError(
        f"{path}: not a safetensors file, PyTorch file, TorchScript archive, .npz or TensorFlow index."
    )


def weights_in(folder: Path) -> Path:
    """The weights file of a folder, by the names that transformers and open_clip use."""
    for name in WEIGHTS:
        if (folder / name).exists():
            return folder / name
    indices = sorted(folder.glob("*.index"))
    if len(indices) == 1:
        return indices[0]
    raise FileNotFoundError(f"{folder}: holds none of {', '.join(WEIGHTS)}. Name the weights file itself.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({error}). Download it again.") from error


def _read_legacy(path: Path) -> Checkpoint:
    """Files from before PyTorch 1.6 are no zip archives; PyTorch's own restricted reader takes them."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: PyTorch's safe reader refuses it: {error}") from error
    return _unwrap(path, tree)


def _read_shards(index: Path) -> Checkpoint:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()), key=str)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of shards ({error!r}).") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(name, str) or name != Path(name).name:
            raise CheckpointError(f"{index}: shard {name!r} is not a file beside the index.")
        tensors |= read_checkpoint(index.parent / name).tensors
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} listed tensors are in no shard, the first is {missing[0]!r}.")
    return Checkpoint(tensors)


def _read_zip(path: Path) -> Checkpoint:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: damaged archive ({error}). Download it again.") from error
    if entries and all(name.endswith(".npy") for name in entries):
        return Checkpoint(_Npz(path, entries))
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: a zip file, but neither a PyTorch file (no data.pkl) nor an .npz.")
    return _unwrap(path, _TorchZip(path, entries, pickles[0].rpartition("/")[0]).read())


class _Npz(Mapping[str, Tensor]):
    """Arrays of an .npz, read when asked for."""

    def __init__(self, path: Path, entries: dict[str, zipfile.ZipInfo]):
        self.path = path
        for name, info in entries.items():
            if info.file_size > 1000 * max(info.compress_size, 1024):
                raise CheckpointError(f"{path}: {name} unpacks to {info.file_size} bytes, a decompression bomb.")
        self.keys_by_name = {name.removesuffix(".npy"): name for name in entries}

    def __getitem__(self, key: str) -> Tensor:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                array = file[key]
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise CheckpointError(f"{self.path}: {key!r} cannot be read ({error}).") from error
        if array.dtype == np.dtype("V2"):  # NumPy has no bfloat16; JAX stores its bytes
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_by_name)

    def __len__(self) -> int:
        return len(self.keys_by_name)


class _Inert:
    """Stands for an object of the file whose class is not loaded: it keeps the attributes and can do nothing."""

    def __init__(self, *_: Any):
        self.attributes: dict[str, Any] = {}

    def set_state(self, state: Any) -> None:
        self.attributes = dict(state) if isinstance(state, Mapping) else {"state": state}


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    length: int


class _TorchZip:
    """A file of `torch.save` or `torch.jit.save`: a pickle of the structure, and one entry per storage."""

    def __init__(self, path: Path, entries: dict[str, zipfile.ZipInfo], prefix: str):
        self.path, self.entries, self.prefix = path, entries, prefix
        self.storages: dict[str, Tensor] = {}

    def read(self) -> Any:
        with self.path.open("rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        order = f"{self.prefix}/byteorder"
        if order in self.entries and bytes(self._bytes(order)) != b"little":
            raise CheckpointError(f"{self.path}: stored on a big-endian machine, which is not supported.")
        pickled = io.BytesIO(self._bytes(f"{self.prefix}/data.pkl"))
        return _Unpickler(pickled, self).load()

    def _bytes(self, name: str) -> memoryview:
        info = self.entries.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: entry {name!r} is missing; the file is damaged.")
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.path}: entry {name!r} is compressed, which PyTorch never does.")
        header = self.memory[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{self.path}: entry {name!r} has no header; the file is damaged.")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + info.file_size > len(self.memory):
            raise CheckpointError(f"{self.path}: entry {name!r} is cut off. Download the file again.")
        return memoryview(self.memory)[start : start + info.file_size]

    def tensor(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        """A view of the file, after checking that it lies inside its storage."""
        if storage.key not in self.storages:
            data = self._bytes(f"{self.prefix}/data/{storage.key}")
            if len(data) < storage.length * storage.dtype.itemsize:
                raise CheckpointError(f"{self.path}: storage {storage.key} is shorter than its tensors.")
            self.storages[storage.key] = (
                torch.frombuffer(data, dtype=storage.dtype, count=storage.length)
                if storage.length
                else torch.empty(0, dtype=storage.dtype)
            )
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise CheckpointError(f"{self.path}: a tensor of storage {storage.key} has no sensible shape.")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and last >= storage.length:
            raise CheckpointError(f"{self.path}: a tensor reaches beyond its storage {storage.key}.")
        return self.storages[storage.key].as_strided(size, stride, offset)


_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_OPCODES = (
    *("PROTO", "STOP", "FRAME", "MARK", "POP", "POP_MARK", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("GET", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "NEWOBJ", "BINPERSID"),
    *(
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
    ),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_SET", "ADDITEMS"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
)


class _Unpickler(pickle._Unpickler):  # the one in Python, whose opcodes can be left out one by one
    """Understands the opcodes a checkpoint needs and the names below. Everything else is refused by name."""

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in (getattr(pickle, n) for n in _OPCODES)
    }

    def __init__(self, file: io.BytesIO, archive: _TorchZip):
        super().__init__(file)
        self.archive = archive
        self.whole_module = False
        self.allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch", "Size"): tuple,
            ("torch", "device"): _Inert,
            ("collections", "OrderedDict"): OrderedDict,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,  # as pickles of protocol 2 call it
            ("argparse", "Namespace"): _Inert,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, *_: value,
            **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "tensor", "double", "bool")},
            **{("torch", name): _storage_type(dtype) for name, dtype in _DTYPES.items()},
        }

    def load(self) -> Any:
        try:
            return super().load()
        except CheckpointError:
            raise
        except KeyError as error:
            code = error.args[0]
            if not isinstance(code, int):
                raise CheckpointError(f"{self.archive.path}: damaged pickle ({error!r}).") from error
            name = _opcode_name(code)
            raise CheckpointError(
                f"{self.archive.path}: its pickle uses opcode {name}, which no checkpoint needs. Refused."
            ) from error
        except Exception as error:  # every way in which a stream of opcodes can make no sense
            raise CheckpointError(f"{self.archive.path}: damaged pickle ({error!r}).") from error

    def find_class(self, module: str, name: str) -> Any:
        # Of a TorchScript class, and of a module and its parts, the attributes are wanted, the code is not.
        self.whole_module |= module.startswith(_MODULE_PACKAGES)
        if module.startswith(("__torch__", *_MODULE_PACKAGES)):
            return _Inert
        if self.whole_module and module.startswith("torch.nn.modules."):
            return _Inert
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        raise CheckpointError(
            f"{self.archive.path}: its pickle asks for {module}.{name}, which a checkpoint has no use for. Refused: "
            "loading it could run foreign code. Ask the authors for a safetensors file."
        )

    def load_build(self) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        if not isinstance(instance, _Inert | OrderedDict):
            raise CheckpointError(f"{self.archive.path}: its pickle sets the state of a {type(instance).__name__}.")
        if isinstance(instance, _Inert):
            instance.set_state(state)

    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, length = pid
        if kind != "storage" or not isinstance(length, int) or length < 0:
            raise CheckpointError(f"{self.archive.path}: unknown persistent object {pid!r}.")
        return _Storage(str(key), storage_type.dtype, length)

    def _tensor(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
        return self.archive.tensor(storage, offset, tuple(size), tuple(stride))


def _storage_type(dtype: torch.dtype) -> Any:
    return argparse.Namespace(dtype=dtype)


def _opcode_name(code: int) -> str:
    names = [n for n, v in vars(pickle).items() if n.isupper() and isinstance(v, bytes) and v == bytes([code])]
    return names[0] if names else hex(code)


def _unwrap(path: Path, tree: Any) -> Checkpoint:
    """The mapping of tensors inside whatever the authors saved around it."""
    if isinstance(tree, _Inert):
        return Checkpoint(dict(_module_tensors(tree)))
    extras: dict[str, Any] = {}
    while isinstance(tree, Mapping):
        inner = next((name for name in WRAPPERS if isinstance(tree.get(name), Mapping)), None)
        if inner is None:
            break
        extras |= {name: _plain(value) for name, value in tree.items() if name != inner}
        tree = tree[inner]
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{path}: holds a {type(tree).__name__}, not a mapping of names to tensors.")
    tensors = {key: value for key, value in tree.items() if isinstance(value, Tensor)}
    extras |= {key: _plain(value) for key, value in tree.items() if key not in tensors}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; its entries are {', '.join(map(str, list(tree)[:8]))}.")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return Checkpoint(tensors, extras)


def _module_tensors(module: _Inert, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of a TorchScript module or of a pickled one, named as its `state_dict()` would."""
    attributes = module.attributes
    if all(kind in attributes for kind in _MEMBERS):
        fleeting = attributes.get("_non_persistent_buffers_set", ())
        members = (item for kind in _MEMBERS for item in attributes[kind].items())
        attributes = {name: value for name, value in members if name not in fleeting}
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Inert):
            yield from _module_tensors(value, f"{prefix}{name}.")


def _plain(value: Any) -> Any:
    """What was stored beside the tensors, with inert objects as the dictionaries of their attributes."""
    if isinstance(value, _Inert | argparse.Namespace):
        return {name: _plain(item) for name, item in vars(value).get("attributes", vars(value)).items()}
    return value
