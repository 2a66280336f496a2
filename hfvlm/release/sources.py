"""The files that a conversion reads: the released one, what lies beside it, and further parts."""

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hfvlm.checkpoints import CheckpointError, read_checkpoint, weights_in
from hfvlm.checkpoints.conversion import Conversion, Source
from hfvlm.checks.files import read_json
from hfvlm.checks.messages import listed
from hfvlm.presets import load_preset
from hfvlm.registry import architectures

# What authors and libraries call the configuration that lies beside the weights.
ORIGINAL_CONFIGS = ("open_clip_config.json", "config.json")


def conversion_of(architecture: str) -> Conversion:
    """Return how an architecture's original checkpoints are read."""
    return importlib.import_module(f"hfvlm.conversion.{architecture}").CONVERSION


def read_sources(source: Path, name: str, parts: Mapping[str, str | Path]) -> dict[str, Source]:
    """Open the released file as "main", what else its release holds, and the `parts`.

    Raises:
        FileNotFoundError: there is no such file or folder, or the release has another that is not there.
        ValueError: the architecture has no such part.
    """
    if not source.exists():
        names = [path.name for path in source.parent.iterdir()] if source.parent.is_dir() else []
        near = difflib.get_close_matches(source.name, names, n=3)
        raise FileNotFoundError(f"{source}: no such file or folder.{f' Did you mean {listed(near)}?' if near else ''}")
    architecture = name if name in architectures() else load_preset(name).architecture
    conversion = conversion_of(architecture)
    if unknown := sorted(set(parts) - set(conversion.parts)):
        has = "; ".join(f"{part}: {what}" for part, what in conversion.parts.items()) or "it is one file"
        raise ValueError(f"{architecture} has no part {', '.join(unknown)} ({has}).")
    roles = conversion.files.get(released_layout(source, name) or "", {})
    paths = {role: beside(source, names) for role, names in roles.items()}
    if source.is_file() and not any(source.name in names for names in roles.values()):
        paths["main"] = source
    missing = [" or ".join(roles[role]) for role, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(f"{source}: the release of {name} also has {', '.join(missing)}, which is not there.")
    found = {"main": source} | {role: path for role, path in paths.items() if path} | dict(parts)
    check_foreign(found["main"])
    return {role: read_source(Path(path)) for role, path in found.items()}


def released_layout(source: Path, name: str) -> str | None:
    """Return the preset's layout; of an architecture, the one whose files are there. None: the configuration's."""
    if name not in architectures():
        return load_preset(name).source.get("layout")
    for layout, roles in conversion_of(name).files.items():
        if source.name in roles["main"] or (source.is_dir() and all(beside(source, n) for n in roles.values())):
            return layout
    return None


def check_foreign(source: str | Path) -> None:
    """Refuse what hfvlm wrote itself; the message names the commands that take it."""
    model_type = str(json_beside(Path(source), ("config.json",)).get("model_type"))
    if any(model_type in architecture.configs for architecture in architectures().values()):
        raise CheckpointError(
            f"{source}: is hfvlm's own already ({model_type} in config.json), there is nothing to convert. "
            "`from_pretrained` loads its folder, `hfvlm verify` checks it, `hfvlm export` makes it transformers' own."
        )


def read_source(path: Path) -> Source:
    """Open a file or folder, with the configuration beside it."""
    if path.is_dir():
        path = weights_in(path)
    names = ("adapter_config.json",) if path.name.startswith("adapter_model.") else ORIGINAL_CONFIGS
    return Source(path, read_checkpoint(path).tensors, json_beside(path, names))


def without_numbers(sources: Mapping[str, Source]) -> dict[str, Source]:
    """Return sources whose tensors have shapes and types alone."""
    return {
        role: replace(source, tensors={name: source.tensors[name].to("meta") for name in source.tensors})
        for role, source in sources.items()
    }


def beside(source: Path, names: tuple[str, ...]) -> Path | None:
    """Find the first of the names in a folder, or in the folder of a file."""
    folder = source if source.is_dir() else source.parent
    return next((folder / name for name in names if (folder / name).exists()), None)


def json_beside(source: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Read the first of the names that is there; nothing where none is."""
    path = beside(source, names)
    return {} if path is None else read_json(path, CheckpointError)
