"""Files of `torch.save` and `torch.jit.save`: a pickle of the structure, and the storages of its tensors.

A zip archive since PyTorch 1.6, whose entries carry checksums; before, one stream of pickles and numbers.
"""

import io
import mmap
import os
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfvlm.checkpoints.errors import CheckpointError
from hfvlm.checkpoints.pickles import Storage, Stored, Unpickler
from hfvlm.checks.files import refusing
from hfvlm.checks.messages import shown

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_HEAD = b"\x80\x02\x8a\x0al\xfc\x9cF"
# Of a zip archive's list of entries, in bytes: the largest checkpoints have 3 MB.
LARGEST_DIRECTORY = 6 * 2**20
BLOCK = 2**22


class TorchFile(ABC):
    """What both kinds share: places of storages in the file, which stay there until they are used."""

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size
        with path.open("rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.storages: dict[str, Tensor] = {}

    @abstractmethod
    def place(self, key: str) -> tuple[int, int]:
        """Return where a storage's bytes begin, and how many there are."""

    @abstractmethod
    def verify(self, key: str) -> None:
        """Compare a storage with its checksum, where there is one."""

    def check(self, storage: Storage) -> None:
        if self.place(storage.key)[1] < storage.length * storage.dtype.itemsize:
            raise CheckpointError(f"{self.path}: storage {shown(storage.key)} is shorter than its tensors.")

    def check_views(self, views: Iterable[Stored]) -> None:
        """Refuse tensors that overlap, or repeat what they have, and so could unfold to any size."""
        if sum(view.bytes for view in views) > 2 * self.size + 2**20:
            raise CheckpointError(f"{self.path}: its tensors would unfold to more than twice its size. Refused.")

    def tensor(self, stored: Stored) -> Tensor:
        """Return a view of the file; the first one of a storage compares it with its checksum."""
        storage, offset, size, stride = stored
        if storage.key not in self.storages:
            self.verify(storage.key)
            self.storages[storage.key] = self._numbers(storage)
        numbers = self.storages[storage.key]
        if numbers.dtype != storage.dtype or len(numbers) < storage.length:
            numbers = self._numbers(storage)
        return numbers.as_strided(size, stride, offset)

    def with_tensors(self, tree: Any) -> Any:
        """Put the tensors themselves in the place of where they are into `tree`, whose levels are few."""
        if isinstance(tree, Stored):
            return self.tensor(tree)
        if isinstance(tree, Storage):
            return None
        if isinstance(tree, dict):
            return {key: self.with_tensors(value) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(map(self.with_tensors, tree))
        return tree

    def _numbers(self, storage: Storage) -> Tensor:
        start, _ = self.place(storage.key)
        if not storage.length:
            return torch.empty(0, dtype=storage.dtype)
        if start % storage.dtype.itemsize == 0:
            return torch.frombuffer(self.memory, dtype=storage.dtype, count=storage.length, offset=start)
        numbers = torch.empty(storage.length, dtype=storage.dtype)
        with self.path.open("rb") as file:
            file.seek(start)
            if file.readinto(numbers.view(torch.uint8).numpy().data) < numbers.nbytes:
                raise CheckpointError(
                    f"{self.path}: storage {shown(storage.key)} is cut off. Download the file again."
                )
        return numbers


class TorchZip(TorchFile):
    """A zip archive: `<name>/data.pkl`, and `<name>/data/<key>` for each storage."""

    def __init__(self, path: Path, entries: Mapping[str, zipfile.ZipInfo], prefix: str):
        super().__init__(path)
        self.entries, self.prefix = entries, prefix
        self.places: dict[str, tuple[int, int]] = {}

    def read(self) -> Any:
        order = f"{self.prefix}/byteorder"
        if order in self.entries and self._bytes(order) != b"little":
            raise CheckpointError(f"{self.path}: stored on a big-endian machine, which is not supported.")
        unpickler = Unpickler(io.BytesIO(self._bytes(f"{self.prefix}/data.pkl")), self, self.size)
        tree = unpickler.load()
        self.check_views(unpickler.views)
        return tree

    def place(self, key: str) -> tuple[int, int]:
        return self._place(f"{self.prefix}/data/{key}")

    def verify(self, key: str) -> None:
        """Compare blocks that are read next to the mapping, so that they do not count as memory in use."""
        name = f"{self.prefix}/data/{key}"
        start, size = self._place(name)
        checksum, left = 0, size
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            while left and (block := file.read(min(left, BLOCK))):
                checksum, left = zlib.crc32(block, checksum), left - len(block)
        self._compare(name, checksum)

    def _bytes(self, name: str) -> bytes:
        start, size = self._place(name)
        data = self.memory[start : start + size]
        self._compare(name, zlib.crc32(data))
        return data

    def _compare(self, name: str, checksum: int) -> None:
        # PyTorch can leave checksums out (torch.serialization.set_crc32_options); it writes zero then.
        if (stored := self.entries[name].CRC) not in (checksum, 0):
            raise CheckpointError(
                f"{self.path}: entry {shown(name)} does not have the checksum it was stored with ({checksum:08x}, "
                f"not {stored:08x}): the file is damaged. Download it again."
            )

    def _place(self, name: str) -> tuple[int, int]:
        if name in self.places:
            return self.places[name]
        info = self.entries.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: entry {shown(name)} is missing; the file is damaged.")
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.path}: entry {shown(name)} is compressed, which PyTorch never does.")
        header = self.memory[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{self.path}: entry {shown(name)} has no header; the file is damaged.")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + info.file_size > self.size:
            raise CheckpointError(f"{self.path}: entry {shown(name)} is cut off. Download the file again.")
        self.places[name] = start, info.file_size
        return self.places[name]


class TorchLegacy(TorchFile):
    """Four pickles - a magic number, a version, the machine's sizes, the structure -, a list of the storages' keys,
    and of each its length and its numbers."""

    def read(self) -> Any:
        stream = self.memory
        magic, version, machine = (self._plain(stream) for _ in range(3))
        if magic != LEGACY_MAGIC or version != 1001 or not isinstance(machine, dict):
            raise CheckpointError(f"{self.path}: not a PyTorch file, though it begins like one.")
        if machine.get("little_endian") is False:
            raise CheckpointError(f"{self.path}: stored on a big-endian machine, which is not supported.")
        wanted = _Wanted(self.path)
        unpickler = Unpickler(stream, wanted, self.size, parts=6)
        tree = unpickler.load()
        self._find(stream, self._plain(stream), wanted.storages)
        self.check_views(unpickler.views)
        return tree

    def _plain(self, stream: mmap.mmap) -> Any:
        return Unpickler(stream, _Wanted(self.path), self.size, parts=6).load()

    def _find(self, stream: mmap.mmap, keys: Any, storages: Mapping[str, Storage]) -> None:
        self.places: dict[str, tuple[int, int]] = {}
        if not isinstance(keys, list) or len(set(map(str, keys))) != len(keys) or set(map(str, keys)) != set(storages):
            raise CheckpointError(
                f"{self.path}: its list of storages is not that of its tensors; the file is damaged."
            )
        at = stream.tell()
        for key in map(str, keys):
            length = int.from_bytes(self.memory[at : at + 8], "little")
            size = length * storages[key].dtype.itemsize
            if at + 8 + size > self.size or length != storages[key].length:
                raise CheckpointError(f"{self.path}: storage {shown(key)} is cut off. Download the file again.")
            self.places[key] = at + 8, size
            at += 8 + size

    def verify(self, key: str) -> None:
        """Do nothing: such files have no checksums."""

    def place(self, key: str) -> tuple[int, int]:
        return self.places[key]


class _Wanted:
    """The storages that a stream names, before it is known where they are."""

    def __init__(self, path: Path):
        self.path = path
        self.storages: dict[str, Storage] = {}

    def check(self, storage: Storage) -> None:
        if self.storages.setdefault(storage.key, storage) != storage:
            raise CheckpointError(f"{self.path}: storage {shown(storage.key)} has two lengths or types.")


class StoredTensors(Mapping[str, Tensor]):
    """Tensors by name, left in the file until they are taken."""

    def __init__(self, file: TorchFile, names: Mapping[str, Stored]):
        self.file, self.names = file, names

    def __getitem__(self, name: str) -> Tensor:
        return self.file.tensor(self.names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def zip_entries(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the entries of an archive by their names.

    Raises:
        CheckpointError: it is damaged, has two entries of one name, or more than any checkpoint has.
    """
    size, count = _directory(path)
    if size > LARGEST_DIRECTORY:
        raise CheckpointError(f"{path}: its list of entries is longer than that of any checkpoint. Refused.")
    with refusing(path, "damaged archive, download it again", CheckpointError), zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    entries = {info.filename: info for info in infos}
    if len(entries) < len(infos) or len(infos) != count:
        raise CheckpointError(f"{path}: damaged archive, its list of entries is not whole, or names one twice.")
    return entries


def _directory(path: Path) -> tuple[int, int]:
    """Read how many bytes and entries the list of entries has from the record at an archive's end, or zeros."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 2**16 - 22 - 76))
        tail = file.read()
    at = len(tail) - 22 if tail[-22:-18] == b"PK\x05\x06" and tail[-2:] == b"\0\0" else tail.rfind(b"PK\x05\x06")
    if at < 0 or at + 22 > len(tail):
        return 0, 0
    count, size = struct.unpack_from("<HI", tail, at + 10)
    # zip64: a longer record before it, and where that one is between the two
    longer = tail.rfind(b"PK\x06\x06", 0, at)
    if 0 <= longer <= at - 56 and (count == 2**16 - 1 or size == 2**32 - 1):
        count, size = struct.unpack_from("<QQ", tail, longer + 32)
    return size, count
