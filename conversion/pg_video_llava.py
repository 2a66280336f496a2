"""PG-Video-LLaVA's release, a projector with a table of embeddings, on LLaVA-1.5; and models trained in whole.

Source: https://github.com/mbzuai-oryx/Video-LLaVA at 0c8810f.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion, Source, always
from hfvlm.checkpoints.key_table import Table
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion import video_chatgpt
from hfvlm.conversion.llava import PROJECTORS
from hfvlm.conversion.video_chatgpt import VOCABULARIES, keys_for, layout_of
from hfvlm.models.pg_video_llava.configuration_pg_video_llava import HfvlmPGVideoLLaVAConfig
from hfvlm.models.pg_video_llava.processing_pg_video_llava import (
    HfvlmPGVideoLLaVAFeatureExtractor,
    HfvlmPGVideoLLaVAProcessor,
    HfvlmPGVideoLLaVATokenizer,
)

PARTS = {
    "base": "LLaVA-1.5 of the same size, as its authors released it",
    "vision": "OpenAI's CLIP ViT-L/14 at 336 pixels, transformers' folder or OpenAI's file",
}
FILES = {
    "projector": {
        "main": ("mm_projector_7b_1.5_336px.bin", "mm_projector_13b_1.5_336px.bin", "mm_projector.bin"),
    }
}
KINDS = (HfvlmPGVideoLLaVAFeatureExtractor, HfvlmPGVideoLLaVATokenizer, HfvlmPGVideoLLaVAProcessor)


def tables_for(config: HfvlmPGVideoLLaVAConfig, layout: str, sources: Mapping[str, Source]) -> list[Table]:
    """Return each source's tensors with their rows; see Video-ChatGPT's."""
    return video_chatgpt.tables_for(config, layout, sources, PARTS)


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmPGVideoLLaVAConfig:
    """Read the base's config.json (with "vision_config", where the tower is at hand) and the projector's file."""
    own = {**original.get("base_config", {}), **original}
    fields = video_chatgpt.fields_from(original, state_dict)
    projector = own.get("mm_projector_type", "mlp2x_gelu")
    if projector not in PROJECTORS:
        raise UnsupportedOriginalError(f"config.json: hfvlm has no mm_projector_type {projector!r}.")
    # At 224 pixels the authors' projector is one layer, whatever their configuration has.
    depth = 1 if fields["vision_config"].image_size == 224 else PROJECTORS[projector]
    return HfvlmPGVideoLLaVAConfig(**fields, projector_depth=depth)


def settings_from_original(original: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the processor's settings. LLaVA-1.5 has no tokens of its own."""
    return video_chatgpt.settings_from_original(original, preprocessing) | {"tokenizer": {}}


def image_processor_for(config: HfvlmPGVideoLLaVAConfig, settings: Mapping[str, Any]) -> Any:
    """Return the processor of videos alone."""
    return video_chatgpt.image_processor_for(config, settings, HfvlmPGVideoLLaVAFeatureExtractor)


def processor_for(
    config: HfvlmPGVideoLLaVAConfig, settings: Mapping[str, Any], vocabulary: Path
) -> HfvlmPGVideoLLaVAProcessor:
    """Return the processor; `vocabulary` is the language model's."""
    processor: Any = video_chatgpt.processor_for(config, settings, vocabulary, KINDS)
    return processor


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
