"""Models by their folder, whether it holds all weights or only an adapter of PEFT's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfvlm.media.sources import import_extra
from hfvlm.registry import find_class

ADAPTER = "adapter_config.json"
PROCESSOR = "processor_config.json"
# What the models of an Auto class of transformers do, and some that do.
DOES = {
    "AutoModelForImageTextToText": "generates text from images or videos, as BLIP and LLaVA do",
    "AutoModelForImageToImage": "paints images from images, as Painter does",
    "AutoModelForSpeechSeq2Seq": "transcribes speech, as Whisper does",
    "AutoModelForCTC": "recognises letters, as wav2vec 2.0 with CTC does",
    "AutoModelForAudioClassification": "classifies audio",
    "AutoModelForZeroShotImageClassification": "classifies images by texts, as CLIP does",
    "AutoModelForCausalLM": "continues texts, as language models do",
    "AutoModelForZeroShotObjectDetection": "detects what texts name, as GroundingDINO does",
    "AutoModelForMaskGeneration": "segments what is in a box, as SAM does",
}


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


def check_does(folder: str | Path, auto: Any, config: Any = None) -> None:
    """Refuse a model that an Auto class of transformers does not load.

    Args:
        folder: a model's or an adapter's, or a Hub id.
        auto: one of `DOES`; every model passes another.
        config: the model's; by default the folder's.

    Raises:
        ValueError: it is another model; the message says what was wanted.
    """
    if auto.__name__ not in DOES:
        return
    config = config_of(folder) if config is None else config
    if type(config) not in auto._model_mapping:
        wanted = DOES[auto.__name__]
        raise ValueError(f"{folder}: its config.json is of {config.model_type!r}, no model that {wanted}.")


def check_holds(folder: str | Path, model: Any, settings: Mapping[str, Any]) -> None:
    """Refuse an adapter with whole parts that the model has not, as a classifier: PEFT would leave them out.

    Raises:
        ValueError: there is such a part.
    """
    known = [name for name, _ in model.named_modules()]
    for part in settings.get("modules_to_save") or ():
        if not any(name == part or name.endswith(f".{part}") for name in known):
            name = type(model).__name__
            raise ValueError(f"{folder}: this adapter does not fit {name}: it holds {part}, which {name} has not.")


def check_whole(folder: str | Path, model: Any, problems: Mapping[str, Any]) -> None:
    """Refuse a model of which weights were not in the folder: they would be random numbers.

    Args:
        folder: it was loaded from.
        model: as loaded.
        problems: what `from_pretrained` tells with `output_loading_info`.

    Raises:
        ValueError: weights are missing; the message says what the folder holds.
    """
    if not (missing := sorted(problems["missing_keys"])):
        return
    held = (config_of(folder).architectures or ["another model"])[0]
    raise ValueError(
        f"{folder}: holds {held}, not {type(model).__name__}: it lacks {len(missing)} of its weights, the first is "
        f"{missing[0]}."
    )


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
        ValueError: the model does something else, weights of it are missing, or the adapter's base is not there, it
            does not fit, or the adapter is a soft prompt.
        ImportError: PEFT is not installed.
    """
    from transformers import AutoModel

    auto = auto or AutoModel
    if base is None and not options.get("trust_remote_code"):
        check_does(folder, auto, options.get("config"))
    settings = adapter_settings(folder)
    info = options.pop("output_loading_info", False)
    if settings is None:
        model, problems = auto.from_pretrained(folder, output_loading_info=True, **options)
        if not info:
            check_whole(folder, model, problems)
        return (model, problems) if info else model
    if is_soft_prompt(settings):
        raise ValueError(
            f"{folder}: a {settings.get('peft_type')} adapter is tokens before inputs, and is merged into no weight: "
            f"load it by peft.PeftModel.from_pretrained."
        )
    peft = import_extra("peft", "train", "Adapters")
    base = base or base_of(folder, settings)
    loaded = auto.from_pretrained(base, output_loading_info=True, **options)
    model, problems = loaded if isinstance(loaded, tuple) else (loaded, {})
    check_holds(folder, model, settings)
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
