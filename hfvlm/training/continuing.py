"""Checkpoints to resume from: the newest that is complete."""

import json
import logging
import re
import struct
import zipfile
from pathlib import Path

logger = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
STATE = "trainer_state.json"
# What FSDP and DeepSpeed write instead of a file, and read themselves.
SHARDED = ("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin", "latest")
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest")
SCHEDULERS = ("scheduler.pt", "latest")


def whole_checkpoint(folder: str | Path, processes: int = 1) -> str:
    """Find the newest checkpoint from which a run can resume; log those that are skipped.

    Args:
        folder: the run's `output_dir`.
        processes: number of them that train.

    Raises:
        ValueError: there is none; the message lists what each lacks.
    """
    found = [(int(path.name.split("-")[1]), path) for path in Path(folder).glob("checkpoint-*") if is_checkpoint(path)]
    skipped: list[str] = []
    for _, path in sorted(found, reverse=True):
        wrong = faults(path, processes)
        if not wrong:
            for text in skipped:
                logger.warning("%s Resuming from %s.", text, path)
            return str(path)
        skipped.append(f"{path} is skipped: {'; '.join(wrong)}.")
    raise ValueError(f"{folder}: no whole checkpoint to resume from. {' '.join(skipped)}".strip())


def check_checkpoint(path: str | Path, processes: int = 1) -> str:
    """Check a checkpoint that a run is to resume from.

    Raises:
        ValueError: it is not whole; the message names what is missing or damaged.
    """
    if not Path(path).is_dir():
        raise ValueError(f"{path}: no such checkpoint.")
    if wrong := faults(Path(path), processes):
        raise ValueError(
            f"{path}: training cannot resume exactly from it: {'; '.join(wrong)}. Name another checkpoint, or begin a "
            "new run from its weights."
        )
    return str(path)


def is_checkpoint(path: Path) -> bool:
    return path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name) is not None


def faults(path: Path, processes: int) -> list[str]:
    """List what is missing or damaged in a checkpoint."""
    wrong = [*weights_faults(path), *json_faults(path / STATE, "global_step")]
    if not any((path / name).exists() for name in OPTIMIZERS):
        wrong.append("no optimizer.pt")
    if not any((path / name).exists() for name in SCHEDULERS):
        wrong.append("no scheduler.pt")
    names = ["rng_state.pth"] if processes < 2 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    wrong += [f"no {name}" for name in names if not (path / name).exists()]
    for name in ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", *names):
        if (path / name).is_file() and not is_whole(path / name):
            wrong.append(f"{name} is truncated")
    return wrong


def weights_faults(path: Path) -> list[str]:
    """List what is wrong with a checkpoint's weights."""
    if any((path / name).exists() for name in SHARDED):
        return []
    names = [name for name in WEIGHTS if (path / name).exists()]
    for index in INDICES:
        if (path / index).exists():
            if wrong := json_faults(path / index, "weight_map"):
                return wrong
            names += sorted(set(json.loads((path / index).read_text(encoding="utf-8"))["weight_map"].values()))
    if not names:
        names = [str(file.relative_to(path)) for file in path.glob("*/adapter_model.safetensors")]
    if not names:
        return ["no weights"]
    missing = [f"no {name}" for name in names if not (path / name).exists()]
    return missing + [f"{x} is truncated" for x in names if (path / x).exists() and not is_whole(path / x)]


def json_faults(path: Path, key: str) -> list[str]:
    """List what is wrong with a JSON file that holds an object with a key."""
    if not path.exists():
        return [f"no {path.name}"]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return [f"{path.name} is damaged"]
    return [] if isinstance(content, dict) and key in content else [f"{path.name} is damaged"]


def is_whole(path: Path) -> bool:
    """Check whether a file of weights or of PyTorch ends where its header defines it to end."""
    if path.suffix != ".safetensors":
        return zipfile.is_zipfile(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                return False
            header = json.loads(file.read(length))
        ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, IndexError):
        return False
    return size == 8 + length + max(ends, default=0)
