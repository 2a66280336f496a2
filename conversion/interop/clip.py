"""transformers' CLIPModel, and the vision tower of it that other models are built around."""

import json
from collections.abc import Mapping
from typing import Any

from transformers import CLIPConfig

from hfvlm.checkpoints.conversion import Export
from hfvlm.checkpoints.key_table import Row, scalar
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.blocks import transformers_text_rows, transformers_vision_rows
from hfvlm.conversion.processors import special_tokens
from hfvlm.models.clip.configuration_clip import (
    HfvlmCLIPConfig,
    HfvlmCLIPResNetConfig,
    HfvlmCLIPTextConfig,
    HfvlmCLIPVisionConfig,
)
from hfvlm.models.clip.processing_clip import HfvlmCLIPProcessor

# Fields that mean the same in transformers' configurations.
NATIVE_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "layer_norm_eps", "attention_dropout"),
)


def check_native(config: HfvlmCLIPConfig) -> None:
    """Refuse what transformers' class does not compute: towers of other classes than OpenAI's transformers."""
    if isinstance(config.vision_config, HfvlmCLIPResNetConfig):
        raise UnsupportedOriginalError(
            "transformers' CLIPModel has no ResNet tower; only ViT models can be exchanged."
        )
    parts = {HfvlmCLIPVisionConfig: config.vision_config, HfvlmCLIPTextConfig: config.text_config}
    if others := [type(part).__name__ for kind, part in parts.items() if type(part) is not kind]:
        raise UnsupportedOriginalError(
            f"transformers' CLIPModel has no tower of {' and '.join(others)}; only ViT models as OpenAI's can be "
            "exchanged."
        )


def rows(config: HfvlmCLIPConfig) -> list[Row]:
    """Return the rows of CLIPModel."""
    check_native(config)
    return [
        Row("logit_scale", "logit_scale.scale", scalar),
        *transformers_vision_rows("vision_model", "vision_model"),
        Row("visual_projection.weight", "vision_model.projection.weight"),
        *transformers_text_rows(),
    ]


def config_from_transformers(original: Mapping[str, Any]) -> HfvlmCLIPConfig:
    native: Any = CLIPConfig(**original)
    text = native.text_config
    return HfvlmCLIPConfig(
        vision_config=vision_config_of(native.vision_config, native.projection_dim),
        text_config=HfvlmCLIPTextConfig(
            projection_dim=native.projection_dim,
            **{name: getattr(text, name) for name in (*NATIVE_SIZES, "vocab_size", "max_position_embeddings")},
            **special_tokens(text.vocab_size) | _native_tokens(text),
        ),
        logit_scale_init_value=native.logit_scale_init_value,
    )


def vision_config_of(native: Any, projection_dim: int | None = None) -> HfvlmCLIPVisionConfig:
    """Return the configuration of transformers' CLIPVisionConfig; without a projection the tower is one that other
    models read."""
    sizes = {name: getattr(native, name) for name in (*NATIVE_SIZES, "image_size", "patch_size", "num_channels")}
    return HfvlmCLIPVisionConfig(projection_dim=projection_dim, **sizes)


def _native_tokens(text: Any) -> dict[str, Any]:
    """Return the ids of transformers' configuration, but for end-of-text 2 in released folders, which transformers
    itself reads as "the largest id"."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {} if text.eos_token_id == 2 else {name: getattr(text, name) for name in names}


def config_to_transformers(config: HfvlmCLIPConfig) -> Any:
    """Return transformers' CLIPConfig of the same model."""
    check_native(config)
    vision, text = config.vision_config.to_diff_dict(), config.text_config.to_diff_dict()
    return CLIPConfig(
        architectures=["CLIPModel"],
        projection_dim=config.vision_config.projection_dim,
        vision_config=vision | {"model_type": "clip_vision_model"},
        text_config=text | {"model_type": "clip_text_model"},
        logit_scale_init_value=config.logit_scale_init_value,
    )


def processor_to_transformers(processor: HfvlmCLIPProcessor) -> Any:
    """Return transformers' CLIPProcessor of the same vocabulary and pixels.

    Its tokenizer does not repair broken text (ftfy), and its image processor converts to RGB before it resizes and
    crops odd margins one pixel off; both differ from the originals on such inputs.
    """
    from transformers import CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pixels = processor.image_processor
    if pixels.resize_mode != "shortest" or pixels.size["height"] != pixels.size["width"]:
        raise UnsupportedOriginalError(
            "transformers' CLIPImageProcessor covers squares only (resize_mode 'shortest')."
        )
    model = json.loads(processor.tokenizer.backend_tokenizer.to_str())["model"]
    tokenizer = CLIPTokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],  # type: ignore[misc]
        model_max_length=processor.tokenizer.model_max_length,
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": pixels.size["height"]},
        crop_size=pixels.size,
        resample=pixels.resample,
        image_mean=pixels.image_mean,
        image_std=pixels.image_std,
    )
    return CLIPProcessor(image_processor, tokenizer)


EXPORT = Export(config=config_to_transformers, processor=processor_to_transformers)
