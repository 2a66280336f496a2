"""Processors out of a configuration, a preset's settings and an original vocabulary."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Pillow's numbers of the filters that open_clip and timm name.
FILTERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}


def sized(kind: Callable[..., Any]) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Make the function that gives an image processor of a kind the size of the vision tower's images."""

    def image_processor_for(config: Any, settings: Mapping[str, Any]) -> Any:
        """Return the image processor; the settings named `image_processor` are its own."""
        return kind(**{"size": config.vision_config.image_size} | settings.get("image_processor", {}))

    return image_processor_for


def paired(
    kind: Callable[..., Any],
    image_processor_for: Callable[[Any, Mapping[str, Any]], Any],
    tokenizer: Any,
    longest: int | None = None,
) -> Callable[[Any, Mapping[str, Any], Path], Any]:
    """Make the function that pairs an image processor with a tokenizer; see `tokenizer_for`."""

    def processor_for(config: Any, settings: Mapping[str, Any], vocabulary: Path) -> Any:
        """Return the processor; `vocabulary` is the tokenizer's original file."""
        words = tokenizer_for(tokenizer, config.text_config, settings, vocabulary, longest)
        return kind(image_processor_for(config, settings), words)

    return processor_for


def tokenizer_for(
    kind: Any, text: Any, settings: Mapping[str, Any], vocabulary: Path, longest: int | None = None
) -> Any:
    """Return a tokenizer of a kind, for texts as long as the tower that `text` configures has positions for, or no
    longer than `longest`.

    A kind may name `spare_rows` of the embedding, for which there are no pieces.

    Raises:
        ValueError: the vocabulary is not the tower's.
    """
    length = {"model_max_length": min(text.max_position_embeddings, longest or text.max_position_embeddings)}
    tokenizer = kind.from_vocabulary(vocabulary, **length | settings.get("tokenizer", {}))
    if text.vocab_size - len(tokenizer) not in (0, getattr(kind, "spare_rows", 0)):
        raise ValueError(
            f"{vocabulary}: its {len(tokenizer)} pieces are not the model's {text.vocab_size} "
            "(text_config.vocab_size): this is the vocabulary of another model."
        )
    return tokenizer


def check_vocabulary(vocabulary: Path, found: Any, wanted: Any, what: str, fields: str) -> None:
    """Refuse the vocabulary of another model.

    Args:
        vocabulary: the file.
        found: what its tokenizer has.
        wanted: the same of the configuration.
        what: what these are, with a verb.
        fields: where `wanted` is in the configuration.

    Raises:
        ValueError: the two differ.
    """
    if found != wanted:
        raise ValueError(
            f"{vocabulary}: its {what} {found}, the model's {wanted} ({fields}): this is the vocabulary of another "
            "model."
        )


def special_tokens(vocabulary: int, pad: int | None = None) -> dict[str, Any]:
    """Return the ids of OpenAI's vocabulary, whose start and end are the last two. Without `pad`, padding is the end:
    CLIP reads nothing that comes after it."""
    return {
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1 if pad is None else pad,
    }


def open_clip_pixels(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Translate open_clip's `preprocess_cfg` into settings of an image processor. Without a size in it, as in most of
    its releases, images have the size that the vision tower takes."""
    settings = {
        "resize_mode": preprocess.get("resize_mode", "shortest"),
        "resample": FILTERS[preprocess.get("interpolation", "bicubic")],
        "fill_color": preprocess.get("fill_color", 0),
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }
    if size := preprocess.get("size"):
        settings["size"] = size if isinstance(size, int) else {"height": size[0], "width": size[1]}
    return settings


def transformers_pixels(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Take over the settings of transformers' preprocessor_config.json, or of the same in processor_config.json."""
    settings = preprocessing.get("image_processor", preprocessing)
    return {name: settings[name] for name in ("image_mean", "image_std", "resample") if name in settings}


def settings_from_original(original: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the processor's settings, from open_clip's `preprocess_cfg` or transformers' preprocessor_config.json."""
    if "preprocess_cfg" in original:
        return {"image_processor": open_clip_pixels(original["preprocess_cfg"])}
    return {"image_processor": transformers_pixels(preprocessing)}
