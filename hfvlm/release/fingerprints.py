"""Hashes of what a conversion wrote, so that `hfvlm verify` can tell whether a folder still holds it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hfvlm.checkpoints import CheckpointError, read_checkpoint, weights_in
from hfvlm.checkpoints.saving import DTYPES as WRITTEN

RECORD = "conversion.json"
# As safetensors' headers spell them.
DTYPES = WRITTEN | {torch.complex64: "C64", torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16"}
# Files that describe a model and change nothing that it computes.
PROSE = {"README.md", "NOTICE", "LICENSE", RECORD}
# What transformers may load from a folder.
LOADED = {".json", ".jinja", ".safetensors", ".bin", ".pt", ".model", ".txt", ".tiktoken", ".py"}
# Keys that saving, loading and pushing change.
INCIDENTAL = {"transformers_version", "auto_map", "_name_or_path", "_commit_hash", "is_local", "local_files_only"}
BLOCK = 2**20


def tensor_digest(tensor: Tensor) -> str:
    """Return SHA-256 of a tensor's dtype, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    digest = _begin(DTYPES[tensor.dtype], list(tensor.shape))
    if tensor.numel():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def stored_digests(folder: Path) -> dict[str, str]:
    """Return the digest of every tensor in a folder's weights, read in blocks.

    Raises:
        CheckpointError: a file is cut off or damaged, or a shard is not there.
        FileNotFoundError: there are no weights.
    """
    digests: dict[str, str] = {}
    for path in weight_files(folder):
        stored = _safetensors_digests(path) if path.suffix == ".safetensors" else _other_digests(path)
        for key, digest in stored:
            if key in digests:
                raise CheckpointError(f"{path}: {key!r} is in another shard, too.")
            digests[key] = digest
    return digests


def weight_files(folder: Path) -> list[Path]:
    """Return the file of a folder's weights, or the shards that its index names.

    Raises:
        CheckpointError: the index is none, or names a file that is not beside it.
    """
    path = weights_in(folder)
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        names = sorted(set(read_json(path)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index of shards ({error!r}).") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{path}: shard {name!r} is not there. Convert or download the folder again.")
    return [folder / name for name in names]


def check_whole(path: Path) -> None:
    """Check that a safetensors file has a header, and is as long as that has it.

    Raises:
        CheckpointError: it has not, or is not.
    """
    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cut off or damaged ({error}). Convert or download the folder again."
        ) from error


def _safetensors_digests(path: Path) -> Iterator[tuple[str, str]]:
    check_whole(path)
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            digest = _begin(entry["dtype"], entry["shape"])
            file.seek(start + begin)
            for size in (min(BLOCK, end - at) for at in range(begin, end, BLOCK)):
                digest.update(file.read(size))
            yield key, digest.hexdigest()


def _other_digests(path: Path) -> Iterator[tuple[str, str]]:
    for key, tensor in read_checkpoint(path).tensors.items():
        yield key, tensor_digest(tensor)


def _begin(dtype: str, shape: list[int]) -> Any:
    return hashlib.sha256(f"{dtype} {'x'.join(map(str, shape))}\n".encode())


def settings_of(folder: Path) -> dict[str, Any]:
    """Return the contents of a folder's configurations: of the model, the processor, the tokenizer, of generation."""
    return {path.name: read_json(path) for path in sorted(folder.glob("*config.json")) if path.name != RECORD}


def file_digests(folder: Path) -> dict[str, Any]:
    """Return SHA-256 of every other file that a model may be loaded with; of a JSON file, one for each of its
    sections."""
    skipped = {path.name for path in weight_files(folder)} | {weights_in(folder).name} | set(settings_of(folder))
    return {name: file_digest(folder / name) for name in loaded_files(folder) if name not in skipped}


def loaded_files(folder: Path) -> list[str]:
    """Return the files, by their paths in the folder, that transformers may load."""
    paths = [path for place in (folder, folder / "additional_chat_templates") for path in sorted(place.glob("*"))]
    return [
        path.relative_to(folder).as_posix()
        for path in paths
        if path.is_file() and path.suffix in LOADED and path.name not in PROSE and not path.name.startswith(".")
    ]


def file_digest(path: Path) -> Any:
    if path.suffix == ".json":
        content = read_json(path)
        if isinstance(content, dict):
            return {section: json_digest(value) for section, value in content.items()}
        return json_digest(content)
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def json_digest(content: Any) -> str:
    """Return SHA-256 of a value, however it is indented and its keys are ordered."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Add a hash of itself to a record, which reveals damage and edits, but is no signature."""
    return {**record, "seal": seal_of(record)}


def seal_of(record: Mapping[str, Any]) -> str:
    return json_digest({key: value for key, value in record.items() if key != "seal"})


def read_json(path: Path) -> Any:
    """Return a JSON file's content.

    Raises:
        CheckpointError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cut off or damaged, not JSON ({error}). Convert or download the folder again."
        ) from error


def flat(content: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested mappings, by names such as "vision_config.patch_size"; without what saving changes."""
    if not isinstance(content, Mapping) or not content:
        return {name: content}
    parts = (
        flat(value, f"{name}.{key}" if name else str(key)) for key, value in content.items() if key not in INCIDENTAL
    )
    return {key: value for part in parts for key, value in part.items()}
