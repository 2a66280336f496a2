"""Pins of what a long run depends on, by content: its data, its model and its settings."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfvlm.configuration import MultiEncoderConfig
from hfvlm.media.rows import media_folder
from hfvlm.media.sources import import_extra, parallel

# Larger files are pinned by their size and time alone: reading them twice would take as long as embedding them.
MOST_HASHED = 2**26
MOST_NAMED = 3
# Fields of a configuration that no vector depends on.
INCIDENTAL = ("_name_or_path", "transformers_version", "architectures", "licence", "_commit_hash", "torch_dtype")

Pins = dict[str, list[Any]]


def pinned_data(source: str, split: str, earlier: Pins | None = None) -> Pins:
    """Pin the files that a data set is read from, in their order: of each its size, times in ns and hash; of a data
    set on the Hub, its files and their commit.

    Args:
        source: what `hfvlm.media.rows.load_rows` reads.
        split: of it.
        earlier: those of an earlier run: files whose sizes and times are as they were are not read again.
    """
    folder = media_folder(source)
    if folder is not None:
        files = [str(path) for path in folder.of_split(split)]
    else:
        builder = import_extra("datasets", "train", "Reading data sets").load_dataset_builder(source)
        given = builder.config.data_files or {}
        parts = [name for name in given if re.match(rf"{re.escape(str(name))}(\W|$)", split)] or list(given)
        files = [str(name) for part in parts for name in given[part]]
        if not Path(source).exists():
            origins = {str(part): [list(origin) for origin in given[part].origin_metadata] for part in parts}
            return {source: [json.dumps([files, origins], default=str)]}
    root = Path(source).resolve()
    names = {relative(Path(file), root): Path(file) for file in files}
    pins = parallel(lambda item: pin(item[1], (earlier or {}).get(item[0])), list(names.items()))
    return dict(zip(names, pins, strict=True))


def relative(file: Path, root: Path) -> str:
    """Return a file's name within a folder, or its path if it is outside."""
    path = file.resolve() if not file.is_absolute() else file
    for base in (root, root.resolve()):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return str(path)


def pin(file: Path, earlier: Sequence[Any] | None = None) -> list[Any]:
    """Return size, times in ns and hash of a file, the hash of an earlier pin where nothing else has changed."""
    about = file.stat()
    times = [about.st_size, about.st_mtime_ns, about.st_ctime_ns]
    if earlier is not None and list(earlier[:3]) == times:
        return list(earlier)
    if about.st_size > MOST_HASHED:
        return [*times, None]
    with file.open("rb") as opened:
        return [*times, hashlib.file_digest(opened, "sha256").hexdigest()]


def same_file(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Decide whether two pins are of the same content."""
    if len(a) != 4 or len(b) != 4:
        return list(a) == list(b)
    return a[0] == b[0] and (a[3] == b[3] if a[3] is not None and b[3] is not None else a[1] == b[1])


def difference(earlier: Pins, now: Pins) -> str | None:
    """Describe which files are new, gone or changed; None for no difference."""
    kinds = {
        "new": [name for name in now if name not in earlier],
        "gone": [name for name in earlier if name not in now],
        "changed": [name for name in now if name in earlier and not same_file(earlier[name], now[name])],
    }
    parts = []
    for kind, names in kinds.items():
        if names:
            more = ", ..." if len(names) > MOST_NAMED else ""
            parts.append(f"{len(names)} {kind} ({', '.join(names[:MOST_NAMED])}{more})")
    if not parts and list(earlier) != list(now):
        parts = ["their order"]
    return ", ".join(parts) or None


def content_hash(module: nn.Module) -> str:
    """Hash all weights: their names, types and values."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tower_hashes(model: Any) -> dict[str, str]:
    """Hash, by modality, the weights that embed it, and the fields of their configuration that vectors depend on.

    Of models whose towers can be loaded separately these are the tower's; of others the whole model's.
    """
    separate = isinstance(model.config, MultiEncoderConfig)
    parts = {modality: getattr(model, tower) if separate else model for modality, tower in model.towers.items()}
    hashes: dict[int, str] = {}
    for part in parts.values():
        if id(part) not in hashes:
            digest = hashlib.sha256(content_hash(part).encode())
            digest.update(json.dumps(stripped(part.config.to_dict()), sort_keys=True, default=str).encode())
            hashes[id(part)] = digest.hexdigest()
    return {modality: hashes[id(part)] for modality, part in parts.items()}


def processor_hash(processor: Any) -> str:
    """Hash all settings of a processor's parts, and its vocabulary."""
    digest = hashlib.sha256()
    for name in sorted(set(processor.parts.values())):
        part = getattr(processor, name, None)
        if part is not None:
            about = tokenizer_settings(part) if hasattr(part, "get_vocab") else stripped(part.to_dict())
            digest.update(json.dumps([name, about], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def tokenizer_settings(tokenizer: Any) -> list[Any]:
    """Return what a tokenizer's ids depend on, apart from the arguments of each call."""
    about = [tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.model_max_length, tokenizer.padding_side]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return about
    settings = json.loads(backend.to_str())
    return [*about, {name: value for name, value in settings.items() if name not in ("padding", "truncation")}]


def stripped(settings: Any) -> Any:
    """Remove incidental settings, at any depth."""
    if isinstance(settings, Mapping):
        return {str(k): stripped(v) for k, v in settings.items() if k not in INCIDENTAL}
    return [stripped(value) for value in settings] if isinstance(settings, list | tuple) else settings
