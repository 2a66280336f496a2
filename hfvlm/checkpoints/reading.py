"""Opens a released file or folder, by what it is."""

import io
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from hfvlm.checkpoints.errors import CheckpointError
from hfvlm.checkpoints.flax_files import FlaxFile, is_flax
from hfvlm.checkpoints.torch_files import LEGACY_HEAD, StoredTensors, TorchFile, TorchLegacy, TorchZip, zip_entries
from hfvlm.checkpoints.wrappers import unwrapped, without_marks
from hfvlm.checks.files import LARGEST_JSON, check_regular, read_json, refusing
from hfvlm.checks.messages import listed, shown

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "flax_model.msgpack",
)
# The end of every table of LevelDB's kind, such as TensorFlow's index.
TABLE_END = struct.pack("<Q", 0xDB4775248B80FB57)
# Of safetensors, in bytes: a hundred thousand tensors.
LARGEST_HEADER = 2**23
# Of .npz archives: an entry, and all together, by how much the file is compressed.
MOST_UNPACKED, MOST_UNPACKED_TOGETHER = 1000, 20
MOST_AXES = 64


@dataclass
class Checkpoint:
    """The tensors of a file, by the names the authors gave them, and whatever else was stored beside them."""

    tensors: Mapping[str, Tensor]
    extras: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Open a released file, or a folder that holds one.

    Wrappers (`state_dict`, `model`, ...) are opened; what torch.compile, DDP and FSDP put into names is dropped. The
    tensors stay in the file until they are taken. A tensor that does not have its checksum raises a
    `CheckpointError` then.

    Raises:
        FileNotFoundError: there is no such file, or no weights in the folder.
        CheckpointError: the file is damaged, or asks for code to be run; the message names which.
    """
    path = Path(source)
    if path.is_dir():
        path = weights_in(path)
    check_regular(path, CheckpointError)
    checkpoint = _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)
    if not len(checkpoint.tensors):
        raise CheckpointError(f"{path}: holds no tensors.")
    return Checkpoint(without_marks(checkpoint.tensors), checkpoint.extras)


def _read_file(path: Path) -> Checkpoint:
    """Read one regular file, its tensors under the names that it has for them."""
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"PK"):
        return _read_zip(path)
    if len(head) > 8 and head[8:9] == b"{":
        return Checkpoint(_Safetensors(path))
    if head.startswith(LEGACY_HEAD):
        return _unwrap(path, TorchLegacy(path))
    bundle = _is_bundle(path)
    if not bundle and is_flax(head):
        return Checkpoint(FlaxFile(path))
    return _read_bundle(path, head, bundle=bundle)


def _is_bundle(path: Path) -> bool:
    """Return whether a file is TensorFlow's index, which is recognised by its end."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, len(TABLE_END)), io.SEEK_END)
        return file.read() == TABLE_END


def _read_bundle(path: Path, head: bytes, *, bundle: bool) -> Checkpoint:
    """Read TensorFlow's index; what is not even that is refused."""
    if bundle:
        from hfvlm.checkpoints.tensor_bundle import TensorBundle

        return Checkpoint(TensorBundle(path))
    if head.startswith(b"\x80"):
        raise CheckpointError(f"{path}: a bare pickle, not a checkpoint; nothing was read from it.")
    raise CheckpointError(
        f"{path}: not a safetensors file, PyTorch file, TorchScript archive, .npz, Flax file or TensorFlow index."
    )


def weights_in(folder: Path) -> Path:
    """Return the weights file of a folder, by the names that transformers and open_clip use."""
    for name in WEIGHTS:
        if (folder / name).exists():
            return folder / name
    indices = sorted(folder.glob("*.index"))
    if len(indices) == 1:
        return indices[0]
    raise FileNotFoundError(f"{folder}: holds none of {', '.join(WEIGHTS)}. Name the weights file itself.")


class _Safetensors(Mapping[str, Tensor]):
    """Tensors of a safetensors file."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER and length + 8 <= path.stat().st_size:
            raise CheckpointError(f"{path}: its header has {length} bytes, more than any checkpoint's. Refused.")
        with self._named_errors():
            self.file = safe_open(path, framework="pt")
            self.names = dict.fromkeys(self.file.keys())

    def _named_errors(self) -> Any:
        return refusing(self.path, "damaged safetensors file, download it again", CheckpointError)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with self._named_errors():
            return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _read_shards(index: Path) -> Checkpoint:
    weight_map = read_json(index, CheckpointError, LARGEST_JSON).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: not an index of shards: its weight_map does not name a file for each tensor.")
    shards = {name: _read_file(_shard(index, name)).tensors for name in sorted(set(weight_map.values()))}
    if missing := [key for key, name in weight_map.items() if key not in shards[name]]:
        raise CheckpointError(
            f"{index}: {len(missing)} listed tensors are in no shard where the index says, the first is "
            f"{shown(missing[0])} of {shown(weight_map[missing[0]])}."
        )
    if extra := [key for tensors in shards.values() for key in tensors if key not in weight_map]:
        raise CheckpointError(
            f"{index}: its shards hold {len(extra)} tensors that it does not list: {listed(extra)}. The index and the "
            "shards are of different files; download them again."
        )
    return Checkpoint(_Shards(shards, weight_map))


def _shard(index: Path, name: str) -> Path:
    """Return a shard's path: a regular file in the index's own folder, or where the Hub's cache keeps both."""
    if name != Path(name).name or name in ("", "..") or "\\" in name or name.endswith(".index.json"):
        raise CheckpointError(f"{index}: shard {shown(name)} is not a file beside the index.")
    path = index.parent / name
    check_regular(path, CheckpointError)
    if path.resolve().parent not in (index.parent.resolve(), index.resolve().parent):
        raise CheckpointError(f"{index}: shard {shown(name)} is not a file beside the index, but a link out of it.")
    return path


class _Shards(Mapping[str, Tensor]):
    """Each tensor from the shard that the index names."""

    def __init__(self, shards: Mapping[str, Mapping[str, Tensor]], weight_map: Mapping[str, str]):
        self.shards, self.weight_map = shards, weight_map

    def __getitem__(self, name: str) -> Tensor:
        return self.shards[self.weight_map[name]][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weight_map)

    def __len__(self) -> int:
        return len(self.weight_map)


def _read_zip(path: Path) -> Checkpoint:
    entries = zip_entries(path)
    if entries and all(name.endswith(".npy") for name in entries):
        return Checkpoint(_Npz(path, entries))
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: a zip file, but neither a PyTorch file (no data.pkl) nor an .npz.")
    return _unwrap(path, TorchZip(path, entries, pickles[0].rpartition("/")[0]))


def _unwrap(path: Path, file: TorchZip | TorchLegacy) -> Checkpoint:
    with refusing(path, "damaged PyTorch file", CheckpointError):
        tensors, extras = unwrapped(path, file.read())
    return Checkpoint(StoredTensors(file, tensors), _Extras(file, extras))


class _Extras(Mapping[str, Any]):
    """What was stored beside the tensors; tensors among it are read when their entry is taken."""

    def __init__(self, file: TorchFile, values: Mapping[str, Any]):
        self.file, self.values_by_name = file, values

    def __getitem__(self, name: str) -> Any:
        return self.file.with_tensors(self.values_by_name[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


class _Npz(Mapping[str, Tensor]):
    """Arrays of an .npz, read when taken."""

    def __init__(self, path: Path, entries: Mapping[str, zipfile.ZipInfo]):
        self.path = path
        for name, info in entries.items():
            if info.file_size > MOST_UNPACKED * max(info.compress_size, 1024):
                raise CheckpointError(
                    f"{path}: {shown(name)} unpacks to {info.file_size} bytes, a decompression bomb."
                )
        if sum(info.file_size for info in entries.values()) > MOST_UNPACKED_TOGETHER * path.stat().st_size + 2**24:
            raise CheckpointError(f"{path}: unpacks to far more than its size, a decompression bomb.")
        self.names = {name.removesuffix(".npy"): info for name, info in entries.items()}
        self.archive = zipfile.ZipFile(path)

    def __getitem__(self, key: str) -> Tensor:
        info = self.names[key]
        with refusing(self.path, f"{shown(key)} cannot be read", CheckpointError):
            with self.archive.open(info) as file:
                self._check_claims(file, info)
                file.seek(0)
                array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
            if array.dtype == np.dtype("V2"):  # NumPy has no bfloat16; JAX stores its bytes
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)

    def _check_claims(self, file: Any, info: zipfile.ZipInfo) -> None:
        """Check that the array that a header describes is what follows it, before memory is made for it."""
        version = np.lib.format.read_magic(file)
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}.get(version[0])
        if read is None:
            raise ValueError(f"version {version} of NumPy's format")
        shape, _, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects, which are not read: allow_pickle is off")
        if len(shape) > MOST_AXES or prod(shape) * dtype.itemsize != info.file_size - file.tell():
            raise ValueError("its shape is not that of its data")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
