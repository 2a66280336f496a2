"""Understands the part of pickle that a checkpoint needs, without running anything and within a budget.

What a stream makes are plain containers, `Inert` objects and `Stored` tensors, which are no more than where a tensor
lies. Whatever else a stream asks for is refused by name.
"""

import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from hfvlm.checkpoints.errors import CheckpointError
from hfvlm.checks.messages import shown

# Packages whose checkpoints were released as whole pickled modules alone.
MODULE_PACKAGES = ("dall_e.",)
# Of one stream: the largest checkpoints of 2026 have a tenth of it, and it takes seconds.
MOST_OPCODES = 3_000_000
# What the objects of a stream may take at the least, in bytes; those of a large file may take as much as the file.
SMALLEST_BUDGET = 2**24
# Of one integer, in bytes: a generator's state has 16, most have four.
LONGEST_INTEGER = 32
MOST_AXES = 64
MOST_LEVELS = 64


class Storage(NamedTuple):
    """A run of numbers of a file."""

    key: str
    dtype: torch.dtype
    length: int


class Stored(NamedTuple):
    """Where a tensor is: a storage, the first of its numbers, and how they lie in it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.size) * self.storage.dtype.itemsize


class Archive(Protocol):
    """A file of storages."""

    path: Path

    def check(self, storage: Storage) -> None:
        """Raise a `CheckpointError` unless the file holds the whole storage."""


class Inert:
    """Stands for an object of the file whose class is not loaded: it keeps the attributes and can do nothing."""

    attributes: dict[str, Any]

    def __new__(cls, *_: Any) -> "Inert":
        self = super().__new__(cls)
        self.attributes = {}
        return self

    def __init__(self, *_: Any):
        pass

    def set_state(self, state: Any) -> None:
        self.attributes = state if type(state) is dict else {"state": state}


class _Function(NamedTuple):
    """What a stream may call."""

    call: Callable[..., Any]


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
# What an opcode's object takes, in bytes, with its place on the stack; strings and tuples take their length besides.
_COSTS = {
    **dict.fromkeys(("PROTO", "STOP", "FRAME", "POP", "POP_MARK", "SETITEM", "SETITEMS", "APPEND", "APPENDS"), 0),
    **dict.fromkeys(("ADDITEMS", "NONE", "NEWTRUE", "NEWFALSE", "GET", "BINGET", "LONG_BINGET", "EMPTY_TUPLE"), 8),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL", "BUILD"), 80),
    **dict.fromkeys(("BININT1",), 8),
    **dict.fromkeys(("INT", "BININT", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), 40),
    **dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "MARK"), 72),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), 80),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"), 64),
    **dict.fromkeys(("EMPTY_DICT", "DICT"), 128),
    **dict.fromkeys(("EMPTY_SET",), 256),
    # The memo and growing dictionaries and sets.
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), 112),
    **dict.fromkeys(("REDUCE", "NEWOBJ", "BINPERSID"), 320),
}
_ENTRY = 112  # of a dictionary or a set


class _Charged(Mapping[int, Callable[..., None]]):
    """The table of opcodes; looking one up counts it."""

    def __init__(self, unpickler: "Unpickler"):
        self.unpickler, self.left = unpickler, MOST_OPCODES

    def __getitem__(self, code: int) -> Callable[..., None]:
        self.left -= 1
        if self.left < 0:
            raise CheckpointError(
                f"{self.unpickler.path}: its pickle has more opcodes than any checkpoint's. Refused."
            )
        try:
            cost, function = _TABLE[code]
        except KeyError:
            where, name = self.unpickler.path, _opcode_name(code)
            raise CheckpointError(
                f"{where}: its pickle uses opcode {name}, which no checkpoint needs. Refused."
            ) from None
        self.unpickler.charge(cost)
        return function

    def __iter__(self) -> Iterator[int]:
        return iter(_TABLE)

    def __len__(self) -> int:
        return len(_TABLE)


class Unpickler(pickle._Unpickler):  # the one in Python, whose opcodes can be left out one by one
    """Understands the opcodes a checkpoint needs and the names below. Everything else is refused by name.

    Args:
        file: the stream.
        archive: what holds the storages that the stream names.
        budget: of memory for the stream's objects, in bytes.
        parts: how many parts a storage's name has; 5 in zip archives, 6 before PyTorch 1.6.
    """

    stack: list[Any]
    memo: dict[int, Any]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: Any, archive: Archive, budget: int, parts: int = 5):
        super().__init__(file)
        self.path, self.archive, self.parts = archive.path, archive, parts
        self.budget = max(budget, SMALLEST_BUDGET)
        self.whole_module = False
        self.charged = _Charged(self)
        vars(self)["dispatch"] = self.charged  # where the loop of `load` looks opcodes up
        self.views: dict[Stored, Stored] = {}
        functions: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch", "Size"): lambda sizes: tuple(_sequence(sizes)),
            ("torch", "device"): Inert,
            ("collections", "OrderedDict"): self._ordered,
            ("builtins", "set"): self._set,
            ("__builtin__", "set"): self._set,  # as pickles of protocol 2 call it
            ("argparse", "Namespace"): Inert,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, *_: value,
            **{("torch.jit._pickle", f"build_{kind}list"): self._list for kind in ("int", "tensor", "double", "bool")},
        }
        self.allowed: dict[tuple[str, str], Any] = {name: _Function(call) for name, call in functions.items()}
        self.allowed |= {("torch", name): dtype for name, dtype in _DTYPES.items()}

    def load(self) -> Any:
        try:
            tree = super().load()
        except CheckpointError:
            raise
        except Exception as error:  # every way in which a stream of opcodes can make no sense
            reason = f"{type(error).__name__}: {shown(str(error))}"
            raise CheckpointError(f"{self.path}: damaged pickle ({reason}).") from error
        check_tree(self.path, tree, 4 * (MOST_OPCODES - self.charged.left) + 1000)
        return tree

    def charge(self, cost: int) -> None:
        self.budget -= cost
        if self.budget < 0:
            raise CheckpointError(f"{self.path}: the objects of its pickle would take more memory than it. Refused.")

    def find_class(self, module: str, name: str) -> Any:
        # Of a TorchScript class, and of a module and its parts, the attributes are wanted, the code is not.
        self.whole_module |= module.startswith(MODULE_PACKAGES)
        if module.startswith(("__torch__", *MODULE_PACKAGES)):
            return _Function(Inert)
        if self.whole_module and module.startswith("torch.nn.modules."):
            return _Function(Inert)
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        raise CheckpointError(
            f"{self.path}: its pickle asks for {shown(f'{module}.{name}')[1:-1]}, which a checkpoint has no use for. "
            "Refused: loading it could run foreign code. Ask the authors for a safetensors file."
        )

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) != self.parts or pid[0] != "storage":
            raise CheckpointError(f"{self.path}: unknown persistent object {shown(pid)}.")
        _, dtype, key, _, length, *view = pid
        if not isinstance(dtype, torch.dtype) or not _is_size(length) or not isinstance(key, str | int) or any(view):
            raise CheckpointError(f"{self.path}: unknown persistent object {shown(pid)}.")
        return Storage(str(key), dtype, length)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Stored:
        """Make a tensor after checking that it lies inside its storage, and the storage inside the file."""
        if not isinstance(storage, Storage):
            raise CheckpointError(f"{self.path}: a tensor lies in no storage, but in {shown(storage)}.")
        self.archive.check(storage)
        size, stride = tuple(_sequence(size)), tuple(_sequence(stride))
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or len(size) > MOST_AXES or not all(map(_is_size, numbers)):
            raise CheckpointError(f"{self.path}: a tensor of storage {shown(storage.key)} has no sensible shape.")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and last >= storage.length:
            raise CheckpointError(f"{self.path}: a tensor reaches beyond its storage {shown(storage.key)}.")
        self.charge(128 + 16 * len(size))
        stored = Stored(storage, offset, size, stride)
        return self.views.setdefault(stored, stored)

    def _ordered(self, pairs: Any = ()) -> OrderedDict[Any, Any]:
        result: OrderedDict[Any, Any] = OrderedDict()
        for pair in _sequence(pairs):
            key, value = _sequence(pair)
            self._put(result, key, value)
        return result

    def _set(self, items: Any = ()) -> set[Any]:
        self.charge(256 + _ENTRY * len(_sequence(items)))
        return {self._key(item) for item in items}

    def _list(self, items: Any = ()) -> list[Any]:
        self.charge(96 + 8 * len(_sequence(items)))
        return list(items)

    def _put(self, target: Any, key: Any, value: Any) -> None:
        self.charge(_ENTRY)
        target[self._key(key)] = value

    def _key(self, key: Any) -> Any:
        """Refuse keys but names and numbers; a tuple of tuples could take for ever to hash."""
        flat = key if isinstance(key, tuple) and len(key) <= 8 else (key,)
        if all(isinstance(k, str | bytes | float | None) or (isinstance(k, int) and abs(k) < 2**60) for k in flat):
            return key
        raise CheckpointError(f"{self.path}: {shown(key)} is a key of its pickle, no name or number.")

    # Opcodes, where those of Python do more than a checkpoint needs

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Function) or not isinstance(arguments, tuple):
            raise CheckpointError(f"{self.path}: its pickle calls {shown(function)}, which is no function. Refused.")
        self.stack.append(function.call(*arguments))

    def load_build(self) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        if not isinstance(instance, Inert | OrderedDict):
            kind = "Tensor" if isinstance(instance, Stored) else type(instance).__name__
            raise CheckpointError(f"{self.path}: its pickle sets the state of a {kind}.")
        if isinstance(instance, Inert):
            instance.set_state(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put(self._target(dict), key, value)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        target = self._target(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._put(target, key, value)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._put(self.stack[-1], key, value)

    def load_append(self) -> None:
        value = self.stack.pop()
        self.charge(8)
        self._target(list).append(value)

    def load_appends(self) -> None:
        items = self.pop_mark()
        self.charge(8 * len(items))
        self._target(list).extend(items)

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.charge(_ENTRY * len(items))
        self._target(set).update([self._key(item) for item in items])

    def _target(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise CheckpointError(f"{self.path}: its pickle puts something into {shown(self.stack[-1])}. Refused.")
        return self.stack[-1]

    def load_long1(self) -> None:
        self._long(self.read(1)[0])

    def load_long4(self) -> None:
        self._long(int.from_bytes(self.read(4), "little"))

    def _long(self, size: int) -> None:
        if size > LONGEST_INTEGER:
            raise CheckpointError(f"{self.path}: its pickle has an integer of {size} bytes. Refused.")
        self.stack.append(int.from_bytes(self.read(size), "little", signed=True))

    def load_number(self) -> None:
        """Read INT, LONG and FLOAT: a number in letters, ended by a line's end."""
        text = self.readline().strip().removesuffix(b"L")
        if len(text) > 2 * LONGEST_INTEGER:
            raise CheckpointError(f"{self.path}: its pickle has a number of {len(text)} letters. Refused.")
        booleans = {b"00": False, b"01": True}
        if text in booleans:
            self.stack.append(booleans[text])
        else:
            self.stack.append(float(text) if any(c in text for c in b".eEnN") else int(text))

    def load_put(self) -> None:
        self.memo[self._memo_index()] = self.stack[-1]

    def load_get(self) -> None:
        self.stack.append(self.memo[self._memo_index()])

    def _memo_index(self) -> int:
        index = int(self.readline()[:11])
        if not 0 <= index < 2**32:
            raise CheckpointError(f"{self.path}: its pickle keeps an object under the number {index}. Refused.")
        return index


def _sequence(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{shown(value)} is no list")
    return value


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**62


def _paid(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Read an opcode whose object is as long as the stream has it."""

    def load(unpickler: Unpickler) -> None:
        original(unpickler)
        unpickler.charge(sys.getsizeof(unpickler.stack[-1]))

    return load


def _opcode(name: str) -> Any:
    """Return what an opcode does: our own where it does more than a checkpoint needs, else Python's."""
    own = {"INT": "load_number", "LONG": "load_number", "FLOAT": "load_number", "NEWOBJ": "load_reduce"}
    function = vars(Unpickler).get(own.get(name, f"load_{name.lower()}"))
    if function is None:
        function = pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
    long = "TUPLE" in name or "STRING" in name or "UNICODE" in name or "BYTES" in name or name == "LIST"
    return _paid(function) if long else function


def _opcode_name(code: int) -> str:
    names = [n for n, v in vars(pickle).items() if n.isupper() and isinstance(v, bytes) and v == bytes([code])]
    return names[0] if names else hex(code)


_TABLE: dict[int, tuple[int, Callable[..., None]]] = {
    getattr(pickle, name)[0]: (cost, _opcode(name)) for name, cost in _COSTS.items()
}


def check_tree(path: Path, tree: Any, most: int) -> None:
    """Refuse what could not be walked: containers that hold themselves, too many levels, or more paths than `most`.

    A container that several others share is met once for each of them, as whoever walks the tree would.
    """
    levels, left = [iter((tree,))], most
    while levels:
        item = next(levels[-1], _END)
        if item is _END:
            levels.pop()
            continue
        left -= 1
        children = _children(item)
        if children is None:
            continue
        levels.append(iter(children))
        if left < 0 or len(levels) > MOST_LEVELS:
            raise CheckpointError(f"{path}: its pickle holds itself, or goes too deep to be walked. Refused.")


_END = object()


def _children(item: Any) -> Any:
    if isinstance(item, Storage | Stored | str | bytes):
        return None
    if isinstance(item, Inert):
        return item.attributes.values()
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list | tuple) else None
