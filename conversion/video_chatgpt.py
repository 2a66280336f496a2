"""Video-ChatGPT's release, a projector with a table of embeddings, on LLaVA-Lightning; and models trained in whole.

Source: https://github.com/mbzuai-oryx/Video-ChatGPT at 659e04b.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.compositions import add_delta, lengthened
from hfvlm.checkpoints.conversion import Conversion, Source, always, part_of
from hfvlm.checkpoints.key_table import Row, Table
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.blocks import llama_rows
from hfvlm.conversion.llava import (
    EMBEDDING,
    HEAD,
    VOCABULARIES,
    linear_rows,
    projector_of,
    text_config_of,
    vision_config_from,
    vision_table,
)
from hfvlm.models.video_chatgpt.configuration_video_chatgpt import HfvlmVideoChatGPTConfig
from hfvlm.models.video_chatgpt.processing_video_chatgpt import (
    HfvlmVideoChatGPTFeatureExtractor,
    HfvlmVideoChatGPTProcessor,
    HfvlmVideoChatGPTTokenizer,
)

PARTS = {
    "base": "LLaVA-Lightning 7B v1.1, or with `delta` LLaMA 7B, in transformers' format",
    "delta": "LLaVA-Lightning as its authors released it: its delta to `base`",
    "vision": "OpenAI's CLIP ViT-L/14, transformers' folder or OpenAI's file",
}
FILES = {"projector": {"main": ("video_chatgpt-7B.bin", "mm_projector.bin")}}
KINDS = (HfvlmVideoChatGPTFeatureExtractor, HfvlmVideoChatGPTTokenizer, HfvlmVideoChatGPTProcessor)
# Around videos, in the order of their ids, the last of the vocabulary.
MARKS = ("<vid_patch>", "<vid_start>", "<vid_end>")
# LLaVA's, which come before.
IMAGE_MARKS = ("<im_patch>", "<im_start>", "<im_end>")


def keys_for(config: HfvlmVideoChatGPTConfig, layout: str = "original", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for the main file: of a model trained in whole, or of the projector and its embeddings."""
    if layout == "projector":
        return [Row(EMBEDDING, "language_model.model.embed_tokens.weight"), *linear_rows(config.projector_depth)]
    return [*llama_rows(), *linear_rows(config.projector_depth)]


def tables_for(
    config: HfvlmVideoChatGPTConfig, layout: str, sources: Mapping[str, Source], parts: Mapping[str, str] = PARTS
) -> list[Table]:
    """Return each source's tensors with their rows.

    Raises:
        FileNotFoundError: a part is needed, and was not given.
    """
    vision, main = vision_table(sources, parts), sources["main"].tensors
    if layout == "original":
        return [Table(main, keys_for(config, layout)), vision]
    trained = projector_of(main)
    base = part_of(sources, "base", parts)
    if "delta" in sources:
        base = add_delta(base, sources["delta"].tensors)
    return [
        Table(trained, keys_for(config, layout), "projector"),
        # The release has no outputs for the tokens that were added, which the original fills with noise.
        Table(lengthened(base, [HEAD], len(trained[EMBEDDING])), base_rows(), "base"),
        vision,
    ]


def base_rows() -> list[Row]:
    """Return the rows of LLaVA without what was trained: its embeddings and its projector."""
    return [
        *(row for row in llama_rows() if row.source != EMBEDDING),
        Row(EMBEDDING, None),
        Row("model.mm_projector.{...}", None, optional=True),
    ]


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmVideoChatGPTConfig:
    """Read the base's config.json (with "vision_config", where the tower is at hand) and the projector's file."""
    return HfvlmVideoChatGPTConfig(**fields_from(original, state_dict))


def fields_from(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of the configuration, as the authors' settings and the shapes define them."""
    own = {**original.get("base_config", {}), **original}
    if own.get("mm_resampler_type"):
        raise UnsupportedOriginalError(f"config.json: hfvlm has no mm_resampler_type {own['mm_resampler_type']!r}.")
    tensors = projector_of(state_dict)
    vocabulary = len(tensors[EMBEDDING]) if EMBEDDING in tensors else own["vocab_size"]
    return {
        "vision_config": vision_config_from(own),
        "text_config": text_config_of(own, vocabulary),
        "video_token_id": own.get("vid_patch_token", vocabulary - len(MARKS)),
        "vision_feature_layer": own.get("mm_vision_select_layer", -2),
    }


def settings_from_original(original: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the processor's settings."""
    own = {**original.get("base_config", {}), **original}
    marks = {} if own.get("mm_use_vid_start_end", own.get("use_vid_start_end", True)) else unmarked()
    return {"tokenizer": {"added": list(IMAGE_MARKS)}, **marks}


def unmarked() -> dict[str, str]:
    """Return the settings of a processor that puts no tokens around videos."""
    return {"video_start": "", "video_end": ""}


def image_processor_for(config: HfvlmVideoChatGPTConfig, settings: Mapping[str, Any], kind: Any = None) -> Any:
    """Return the processor of videos alone."""
    own = {"size": config.vision_config.image_size}
    return (kind or HfvlmVideoChatGPTFeatureExtractor)(**own | settings.get("video_feature_extractor", {}))


def processor_for(
    config: HfvlmVideoChatGPTConfig, settings: Mapping[str, Any], vocabulary: Path, kinds: Any = KINDS
) -> HfvlmVideoChatGPTProcessor:
    """Return the processor; `vocabulary` is the language model's. `kinds` are the classes of its parts and its own."""
    extractor, tokenizer, processor = kinds
    options = dict(settings.get("tokenizer", {}))
    added, size = list(options.pop("added", ())), config.video_token_id
    known = len(tokenizer.from_vocabulary(vocabulary, **options))
    if known > size:
        raise ValueError(
            f"{vocabulary}: its {known} pieces are more than the model's {size} (video_token_id): this is the "
            "vocabulary of another model."
        )
    # Some vocabularies have LLaVA's tokens already. Rows that the embedding table has for no piece get names, so that
    # the placeholder comes after them.
    added = added if known + len(added) <= size else []
    filling = [f"<unused_{i}>" for i in range(known + len(added), size)]
    names = ("conversation", "training_conversation", "video_start", "video_end")
    return processor(
        image_processor_for(config, settings, extractor),
        tokenizer.from_vocabulary(vocabulary, added=[*added, *filling, *MARKS], **options),
        **{name: settings[name] for name in names if name in settings},
        patch_size=config.vision_config.patch_size,
        temporal_tokens=config.temporal_tokens,
    )


# The projector alone is recognised by its file, or by a preset.
layout_of = always("original")
CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    settings_from_original=settings_from_original,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([VOCABULARIES]),
    parts=PARTS,
    files=FILES,
    compose=tables_for,
)
