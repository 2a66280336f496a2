"""Original checkpoints to hfvlm: one key table an architecture.

A module has

- `config_from_original(original, state_dict)`: reads the original's own configuration in its own names, and takes what
  that leaves open from the shapes of its tensors;
- `layout_of(original)` and `keys_for(config, layout, keys)`: the rows for one released layout;
- `settings_from_original(original, preprocessing)`, `image_processor_for(config, settings)` and `processor_for(config,
  settings, vocabulary)`, with `VOCABULARIES`, the names of the tokenizer's original file; where a processor needs
  several files, or none, `vocabularies_for(config)`, the names of each;
- where transformers has the architecture, `config_to_transformers(config)` and `processor_to_transformers(processor)`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class UnsupportedOriginalError(ValueError):
    """An original configuration with an option that hfvlm's architecture does not have."""


def original_config(original: Mapping[str, Any]) -> Mapping[str, Any]:
    """The constructor's arguments, out of whatever records them: a golden case, or open_clip's own file."""
    for wrapper in ("constructor", "model_cfg"):
        original = original.get(wrapper, original)
    return original


def check_options(where: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse what would be ignored: an option that is set and that `known` does not name."""
    unknown = sorted(name for name, value in options.items() if value and name not in set(known))
    if unknown:
        raise UnsupportedOriginalError(f"{where}: hfvlm does not implement {', '.join(unknown)}.")


def vocabularies_of(module: Any, config: Any) -> list[tuple[str, ...]]:
    """The names of each file that the processor's tokenizers are made of; none where the model reads no texts."""
    return module.vocabularies_for(config) if hasattr(module, "vocabularies_for") else [module.VOCABULARIES]


def count_layers(keys: Iterable[str], prefix: str) -> int:
    """Layers numbered from zero under `prefix`, which ends before the number."""
    numbers = {key.removeprefix(prefix).partition(".")[0] for key in keys if key.startswith(prefix)}
    return len(numbers)


def tokenizer_for(
    kind: Any, text: Any, settings: Mapping[str, Any], vocabulary: Path, longest: int | None = None
) -> Any:
    """A tokenizer of a kind, for texts as long as the tower that `text` configures has positions for, or no longer
    than `longest`.

    Raises:
        ValueError: the vocabulary is not the tower's.
    """
    length = {"model_max_length": min(text.max_position_embeddings, longest or text.max_position_embeddings)}
    tokenizer = kind.from_vocabulary(vocabulary, **length | settings.get("tokenizer", {}))
    if len(tokenizer) != text.vocab_size:
        raise ValueError(
            f"{vocabulary}: its {len(tokenizer)} pieces are not the model's {text.vocab_size} "
            "(text_config.vocab_size): this is the vocabulary of another model."
        )
    return tokenizer


FILTERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}


def open_clip_pixels(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` as settings of an image processor."""
    size = preprocess.get("size", 224)
    return {
        "size": size if isinstance(size, int) else {"height": size[0], "width": size[1]},
        "resize_mode": preprocess.get("resize_mode", "shortest"),
        "resample": FILTERS[preprocess.get("interpolation", "bicubic")],
        "fill_color": preprocess.get("fill_color", 0),
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def transformers_pixels(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' preprocessor_config.json, or the same inside processor_config.json, as settings."""
    settings = preprocessing.get("image_processor", preprocessing)
    return {name: settings[name] for name in ("image_mean", "image_std", "resample") if name in settings}
