"""Shikra's releases, deltas to LLaMA, and what its authors' scripts make of them.

Source: https://github.com/shikras/shikra at ff79a4c.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints import CheckpointError
from hfvlm.checkpoints.compositions import add_delta
from hfvlm.checkpoints.conversion import Conversion, Source, always, part_of
from hfvlm.checkpoints.key_table import Row, Table
from hfvlm.conversion.blocks import llama_rows
from hfvlm.conversion.llava import (
    EMBEDDING,
    VOCABULARIES,
    linear_rows,
    text_config_of,
    vision_config_from,
    vision_table,
)
from hfvlm.conversion.processors import check_vocabulary, sized
from hfvlm.models.shikra.configuration_shikra import HfvlmShikraConfig
from hfvlm.models.shikra.processing_shikra import (
    HfvlmShikraImageProcessor,
    HfvlmShikraProcessor,
    HfvlmShikraTokenizer,
)
from hfvlm.models.shikra.regions import Bins

PARTS = {
    "base": "LLaMA 7B, to which the release is a delta, in transformers' format",
    "vision": "OpenAI's CLIP ViT-L/14, transformers' folder or OpenAI's file",
}
# Around images, in the order of their ids; they follow LLaMA's.
PATCH, MARKS = "<im_patch>", ("<im_start>", "<im_end>")


def keys_for(config: HfvlmShikraConfig, layout: str = "original", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows of the language model and the projector, which are one file."""
    return [*llama_rows(), *linear_rows(1)]


def tables_for(config: HfvlmShikraConfig, layout: str, sources: Mapping[str, Source]) -> list[Table]:
    """Return each source's tensors with their rows.

    Raises:
        FileNotFoundError: a part is needed, and was not given.
        CheckpointError: a base was given with a whole model.
    """
    tensors = sources["main"].tensors
    if layout == "delta":
        tensors = add_delta(part_of(sources, "base", PARTS), tensors)
    elif "base" in sources:
        raise CheckpointError("This is a whole model: leave `base` out, or choose the preset of a delta.")
    return [Table(tensors, keys_for(config)), vision_table(sources, PARTS)]


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmShikraConfig:
    """Read the release's config.json (with "vision_config", where the tower is at hand)."""
    vocabulary = len(state_dict[EMBEDDING]) if EMBEDDING in state_dict else original["vocab_size"]
    added = 1 + (len(MARKS) if has_marks(original) else 0)
    return HfvlmShikraConfig(
        vision_config=vision_config_from(original),
        text_config=text_config_of(original, vocabulary),
        image_token_id=original.get("im_patch_token", vocabulary - added),
        vision_feature_layer=original.get("mm_vision_select_layer", -2),
    )


def has_marks(original: Mapping[str, Any]) -> bool:
    """Tell whether images have tokens around them."""
    return original.get("mm_use_im_start_end", True)


def settings_from_original(original: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the processor's settings."""
    return {} if has_marks(original) else {"image_start": "", "image_end": ""}


image_processor_for = sized(HfvlmShikraImageProcessor)


def processor_for(config: HfvlmShikraConfig, settings: Mapping[str, Any], vocabulary: Path) -> HfvlmShikraProcessor:
    """Return the processor; `vocabulary` is LLaMA's, or the release's own."""
    options = dict(settings.get("tokenizer", {}))
    known = HfvlmShikraTokenizer.from_vocabulary(vocabulary, **options).get_vocab()
    marks = [mark for mark in (settings.get("image_start", MARKS[0]), settings.get("image_end", MARKS[1])) if mark]
    bins = Bins(settings["num_bins"]).tokens if settings.get("num_bins") else []
    # Rows that the embedding table has for no piece get names, so that the placeholder comes after them.
    filling = [] if PATCH in known else [f"<unused_{i}>" for i in range(len(known), config.image_token_id)]
    added = [token for token in (*filling, PATCH, *marks, *bins) if token not in known]
    names = ("image_start", "image_end", "digits", "brackets", "num_bins")
    processor = HfvlmShikraProcessor(
        image_processor_for(config, settings),
        HfvlmShikraTokenizer.from_vocabulary(vocabulary, added=added, **options),
        patch_size=config.vision_config.patch_size,
        **{name: settings[name] for name in names if name in settings},
    )
    check_vocabulary(vocabulary, processor.image_token_id, config.image_token_id, "placeholder is", "image_token_id")
    return processor


# A delta is recognised by its preset.
CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=always("original"),
    settings_from_original=settings_from_original,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([VOCABULARIES]),
    parts=PARTS,
    compose=tables_for,
)
