"""Adapters and their bases as one model."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfvlm.inference.adapters import (
    ADAPTER,
    PROCESSOR,
    adapter_settings,
    base_of,
    hub_name,
    load_model,
    model_class,
    processor_of,
)
from hfvlm.presets import Preset, load_preset
from hfvlm.presets.cards import record_of, write_card
from hfvlm.writing import new_folder


@contextmanager
def whole(folder: str | Path) -> Iterator[Path]:
    """Return a model's own folder, or one for the time of the block with an adapter and its base merged."""
    if adapter_settings(folder) is None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield merge(folder, Path(temporary) / Path(folder).name)


def merge(adapter: str | Path, output: str | Path, *, base: str | Path | None = None, overwrite: bool = False) -> Path:
    """Write an adapter and its base as one model, with its processor, its card and the base's licence.

    Args:
        adapter: the folder, as `hfvlm train` or PEFT's `save_pretrained` wrote it.
        output: the new folder; it is written beside and moved into place.
        base: a folder or Hub id; by default the one that the adapter names.
        overwrite: replace an existing output.

    Raises:
        ValueError: the folder holds no adapter, or its base is not there.
        FileExistsError: there is an output already.
        ImportError: PEFT is not installed.
    """
    settings = adapter_settings(adapter)
    if settings is None:
        raise ValueError(f"{adapter}: holds no adapter ({ADAPTER}); a whole model needs no merging.")
    base = str(base or base_of(adapter, settings))
    kind = model_class(base)
    with new_folder(output, overwrite=overwrite) as folder:
        load_model(adapter, kind, base=base, dtype="auto").save_pretrained(folder)
        beside = (Path(adapter) / PROCESSOR).is_file()
        processor_of(adapter if beside else base).save_pretrained(folder)
        text = f"A {described(settings)}, `{Path(adapter).name}`, merged into `{Path(base).name}`."
        write_card(folder, preset_of(base), name=Path(output).name, base_model=hub_name(base), text=text)
    return Path(output)


def preset_of(base: str) -> Preset | None:
    """Return the preset that a base was converted by, which knows its licence's notes; None where no file names
    one."""
    name = record_of(Path(base)).get("preset", "")
    return load_preset(name) if "/" in name else None


def described(settings: dict[str, Any]) -> str:
    """Return an adapter in a few words, as "LoRA adapter of rank 16"."""
    rank = settings.get("r")
    kind = str(settings.get("peft_type", "PEFT")).upper().replace("LORA", "LoRA")
    return f"{kind} adapter" + (f" of rank {rank}" if isinstance(rank, int) else "")
