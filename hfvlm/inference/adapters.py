"""Models by their folder, whether it holds all weights or only an adapter of PEFT's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfvlm.media.sources import import_extra
from hfvlm.registry import find_class

ADAPTER = "adapter_config.json"
PROCESSOR = "processor_config.json"


def adapter_settings(folder: str | Path) -> dict[str, Any] | None:
    """Return what PEFT wrote about an adapter; None for a folder or a Hub id that is a whole model.

    Raises:
        ValueError: the file is damaged.
    """
    path: Path | None
    if Path(folder).is_dir():
        path = Path(folder) / ADAPTER
        if not path.is_file() or (Path(folder) / "config.json").is_file():
            return None
    else:
        from transformers.utils.peft_utils import find_adapter_config_file

        found = find_adapter_config_file(str(folder))
        if found is None:
            return None
        path = Path(found)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: an adapter's settings are an object, not {type(settings).__name__}.")
    return settings


def base_of(folder: str | Path, settings: dict[str, Any]) -> str:
    """Return the folder or Hub id of the model that an adapter belongs to; a relative path may begin in the adapter's
    folder or beside it.

    Raises:
        ValueError: the adapter names none, or one that is not there.
    """
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{folder}: its {ADAPTER} names no base_model_name_or_path, the model that it belongs to.")
    near = (Path(base), Path(folder) / base, Path(folder).resolve().parent / base)
    if (found := next((path for path in near if path.is_dir()), None)) is not None:
        return str(found)
    if Path(base).is_absolute() or base.startswith(".") or base.count("/") > 1:
        raise ValueError(
            f"{folder}: is an adapter of {base}, which is not there: set base_model_name_or_path in its {ADAPTER} to "
            "where the model lies now, or merge them: hfvlm merge ADAPTER --base MODEL -o OUTPUT."
        )
    return base


def config_of(folder: str | Path, **options: Any) -> Any:
    """Return the configuration of a model, or of the model that an adapter belongs to; `options` are of
    `AutoConfig.from_pretrained`."""
    from transformers import AutoConfig

    settings = adapter_settings(folder)
    return AutoConfig.from_pretrained(folder if settings is None else base_of(folder, settings), **options)


def processor_of(folder: str | Path, **options: Any) -> Any:
    """Return the processor of a model; of an adapter the one beside it, else its base's."""
    from transformers import AutoProcessor

    settings = adapter_settings(folder)
    if settings is None or (Path(folder) / PROCESSOR).is_file():
        return AutoProcessor.from_pretrained(folder, **options)
    return AutoProcessor.from_pretrained(base_of(folder, settings), **options)


def is_soft_prompt(settings: Mapping[str, Any]) -> bool:
    """Return whether an adapter's settings are of prompt tuning, p-tuning or prefix tuning."""
    return "num_virtual_tokens" in settings


def load_model(folder: str | Path, auto: Any = None, *, base: str | Path | None = None, **options: Any) -> Any:
    """Load a model; an adapter is merged into its base.

    Args:
        folder: a model's or an adapter's, or a Hub id.
        auto: a class with `from_pretrained`; by default AutoModel.
        base: of an adapter whose base lies elsewhere now.
        **options: of `from_pretrained`.

    Raises:
        ValueError: the adapter's base is not there, it does not fit, or the adapter is a soft prompt.
        ImportError: PEFT is not installed.
    """
    from transformers import AutoModel

    auto = auto or AutoModel
    settings = adapter_settings(folder)
    if settings is None:
        return auto.from_pretrained(folder, **options)
    if is_soft_prompt(settings):
        raise ValueError(
            f"{folder}: a {settings.get('peft_type')} adapter is tokens before inputs, and is merged into no weight: "
            f"load it by peft.PeftModel.from_pretrained."
        )
    peft = import_extra("peft", "train", "Adapters")
    base = base or base_of(folder, settings)
    info = options.pop("output_loading_info", False)
    loaded = auto.from_pretrained(base, output_loading_info=True, **options)
    model, problems = loaded if isinstance(loaded, tuple) else (loaded, {})
    try:
        merged = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{folder}: this adapter does not fit {base}: {error}") from error
    return (merged, problems) if info else merged


def model_class(folder: str) -> Any:
    """Return the class that a model's configuration names.

    Raises:
        ValueError: hfvlm has no such class.
    """
    names = config_of(folder).architectures or ["nothing"]
    if (kind := find_class(names[0])) is None:
        raise ValueError(f"{folder}: its config.json names {names[0]}, which is no model of hfvlm.")
    return kind


def hub_name(base: str) -> str | None:
    """Return the Hub id of a base; of a local folder what its card names as its own base."""
    if not Path(base).is_dir():
        return base
    from huggingface_hub import ModelCard

    card = Path(base) / "README.md"
    named = ModelCard.load(card).data.get("base_model") if card.is_file() else None
    return named[0] if isinstance(named, list) and named else named if isinstance(named, str) else None
