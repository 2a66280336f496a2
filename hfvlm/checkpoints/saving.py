"""Writes safetensors one tensor after another, so that one alone is in memory beside the file they come from."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
# Of numbers that are checked at a time.
BLOCK = 2**20


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made when it is taken, and not cached."""

    def __init__(self, makers: dict[str, Callable[[], Tensor]]):
        self.makers = makers

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> "LazyTensors":
        """Take the named tensors of a mapping, by default all, each when it is taken from here."""
        return cls({name: partial(tensors.__getitem__, name) for name in (tensors if names is None else names)})

    def __or__(self, others: "LazyTensors") -> "LazyTensors":
        return LazyTensors({**self.makers, **others.makers})

    def __getitem__(self, name: str) -> Tensor:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def save_tensors(
    path: Path,
    shapes: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    visit: Callable[[str, Tensor], None] | None = None,
    about: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Write a safetensors file.

    Args:
        path: the new file.
        shapes: what is written, in shape and type; meta tensors will do.
        tensors: the numbers, taken one by one; they are cast to the types of `shapes`.
        visit: sees each tensor by its name as it is written, contiguous and in its type.
        about: the file's metadata.
    """
    # The widest first, so that every tensor lies at a multiple of its width.
    names = sorted(shapes, key=lambda name: (-shapes[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(about)}
    end = 0
    for name in names:
        if shapes[name].dtype not in DTYPES:
            raise ValueError(f"{name} is of {shapes[name].dtype}, which safetensors files do not hold.")
        start, end = end, end + shapes[name].nbytes
        header[name] = {
            "dtype": DTYPES[shapes[name].dtype],
            "shape": list(shapes[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name].detach().to(shapes[name].dtype).contiguous()
            if tensor.shape != shapes[name].shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(shapes[name].shape)}.")
            if visit:
                visit(name, tensor)
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def count_nonfinite(tensor: Tensor) -> int:
    """Count the numbers that are NaN or infinite, a block at a time."""
    if not tensor.is_floating_point():
        return 0
    return sum(block.numel() - int(block.isfinite().sum()) for block in tensor.reshape(-1).split(BLOCK))
