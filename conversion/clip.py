"""CLIP's released files: OpenAI's archives, open_clip's files of the same layout, and transformers' folders.

Sources: https://github.com/openai/CLIP at d05afc4, https://github.com/mlfoundations/open_clip at 89fb801.
"""

from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion, always
from hfvlm.checkpoints.key_table import Row, scalar, transpose
from hfvlm.checkpoints.originals import check_options, count_layers, original_config
from hfvlm.conversion.blocks import openai_layers, openai_vision_rows, transformers_vision_rows
from hfvlm.conversion.interop import clip as interop
from hfvlm.conversion.processors import open_clip_pixels, paired, sized, special_tokens, transformers_pixels
from hfvlm.conversion.timm_towers import timm_config, timm_rows
from hfvlm.models.clip.configuration_clip import (
    HfvlmCLIPConfig,
    HfvlmCLIPResNetConfig,
    HfvlmCLIPTextConfig,
    HfvlmCLIPVisionConfig,
)
from hfvlm.models.clip.configuration_clip_timm import TimmVisionConfig
from hfvlm.models.clip.processing_clip import HfvlmCLIPImageProcessor, HfvlmCLIPProcessor, HfvlmCLIPTokenizer

VOCABULARIES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab.txt.gz", "tokenizer.json")
# Sizes that the archives repeat as entries of their own.
ARCHIVE_ENTRIES = ("input_resolution", "context_length", "vocab_size")


def layout_of(original: Mapping[str, Any]) -> str:
    model_type = original.get("model_type", "")
    if model_type.startswith("hfvlm_clip"):
        return "hfvlm"
    return "transformers" if model_type in ("clip", "clip_vision_model") else "openai"


def keys_for(config: HfvlmCLIPConfig, layout: str = "openai", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for a file of `layout`: "openai", which is also open_clip's, or "transformers"."""
    if layout == "transformers":
        return interop.rows(config)
    # open_clip's models with a text tower of their own
    prefix = "text." if "text.text_projection" in set(keys) else ""
    return [
        Row("logit_scale", "logit_scale.scale", scalar),
        *(Row(name, None, optional=True) for name in ARCHIVE_ENTRIES),
        *vision_rows(config.vision_config),
        Row(f"{prefix}token_embedding.weight", "text_model.embeddings.token.weight"),
        Row(f"{prefix}positional_embedding", "text_model.embeddings.position"),
        *openai_layers(f"{prefix}transformer.resblocks", "text_model.layers"),
        Row(f"{prefix}ln_final.{{}}", "text_model.post_norm.{}"),
        Row(f"{prefix}text_projection", "text_model.projection.weight", transpose),
    ]


def vision_rows(config: Any) -> list[Row]:
    """Return the rows of a vision tower in OpenAI's or open_clip's files."""
    if isinstance(config, HfvlmCLIPResNetConfig):
        return resnet_rows()
    if isinstance(config, TimmVisionConfig):
        return timm_rows(config)
    return openai_vision_rows("visual", "vision_model")


def resnet_rows() -> list[Row]:
    return [
        Row("visual.conv{}.weight", "vision_model.stem.conv{}.conv.weight"),
        Row("visual.bn{}.{}", "vision_model.stem.conv{}.norm.{}"),
        Row("visual.layer{}.{}.conv{}.weight", "vision_model.stage{}.{}.conv{}.conv.weight"),
        Row("visual.layer{}.{}.bn{}.{}", "vision_model.stage{}.{}.conv{}.norm.{}"),
        Row("visual.layer{}.{}.downsample.0.weight", "vision_model.stage{}.{}.shortcut.conv.weight"),
        Row("visual.layer{}.{}.downsample.1.{}", "vision_model.stage{}.{}.shortcut.norm.{}"),
        Row("visual.attnpool.positional_embedding", "vision_model.position"),
        *(Row(f"visual.attnpool.{part}_proj.{{}}", f"vision_model.pool.{part}_proj.{{}}") for part in "qkv"),
        Row("visual.attnpool.c_proj.{}", "vision_model.pool.out_proj.{}"),
    ]


def tower_rows(layout: str, keys: Iterable[str]) -> list[Row]:
    """Return the rows for models that read a CLIP's vision transformer: those without the projection, and what they
    leave out.

    `layout` is "openai", "transformers" (CLIPModel's or CLIPVisionModel's folder) or "hfvlm".
    """
    if layout == "openai":
        rows = [row for row in openai_vision_rows("visual", "vision_model") if row.source != "visual.proj"]
        left_out = [
            "visual.proj",
            "text_projection",
            "transformer.{...}",
            "text.{...}",
            "ln_final.{}",
            *ARCHIVE_ENTRIES,
        ]
        left_out += ["token_embedding.weight", "positional_embedding", "logit_scale"]
    elif layout == "transformers":
        prefix = "vision_model" if any(key.startswith("vision_model.") for key in keys) else ""
        rows = transformers_vision_rows(prefix, "vision_model")
        rows = [row._replace(source=row.source.removeprefix(".")) for row in rows]
        left_out = ["visual_projection.weight", "text_projection.weight", "text_model.{...}", "logit_scale"]
    else:
        parts = ("patches.{...}", "class_token", "position", "pre_norm.{}", "layers.{...}", "post_norm.{}")
        rows = [Row(f"vision_model.{part}", f"vision_model.{part}") for part in parts]
        left_out = ["vision_model.projection.weight", "text_model.{...}", "logit_scale.{}"]
    # The text tower, the temperature and the projections are for comparing images with texts.
    return [*rows, *(Row(name, None, optional=True) for name in left_out)]


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmCLIPConfig:
    """Read OpenAI's constructor arguments (none are needed), open_clip's model config, or transformers'
    config.json."""
    original = original_config(original)
    if original.get("model_type") == "clip":
        return interop.config_from_transformers(original)
    if "vision_cfg" in original:
        return _from_open_clip(original, state_dict)
    return HfvlmCLIPConfig(
        vision_config=_vision_config(state_dict, "quick_gelu"),
        text_config=_text_config(state_dict, "quick_gelu", original.get("transformer_heads")),
    )


def _from_open_clip(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmCLIPConfig:
    vision, text = original["vision_cfg"], original["text_cfg"]
    known = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text")
    check_options("open_clip's model config", original, known)
    check_options(
        "open_clip's text_cfg", text, ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
    )
    act = "quick_gelu" if original.get("quick_gelu") else "gelu"
    if "timm_model_name" in vision:
        config: Any = timm_config(vision, state_dict)
    else:
        sizes = ("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio")
        check_options("open_clip's vision_cfg", vision, sizes)
        config = _vision_config(state_dict, act, vision.get("head_width"), vision.get("image_size"))
    return HfvlmCLIPConfig(vision_config=config, text_config=_text_config(state_dict, act, text.get("heads")))


def _vision_config(
    state_dict: Mapping[str, Tensor], act: str, head_width: int | None = None, image_size: Any = None
) -> HfvlmCLIPVisionConfig | HfvlmCLIPResNetConfig:
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    if "visual.attnpool.c_proj.weight" in shapes:
        stem = shapes["visual.conv3.weight"][0]
        return HfvlmCLIPResNetConfig(
            image_size=32 * isqrt(shapes["visual.attnpool.positional_embedding"][0] - 1),
            stem_size=stem,
            depths=[count_layers(shapes, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
            projection_dim=shapes["visual.attnpool.c_proj.weight"][0],
            num_attention_heads=stem * 32 // 64,
        )
    sizes = vision_sizes(shapes, head_width, image_size)
    return HfvlmCLIPVisionConfig(**sizes, hidden_act=act, projection_dim=shapes["visual.proj"][1])


def vision_sizes(shapes: Mapping[str, Any], head_width: int | None = None, image_size: Any = None) -> dict[str, Any]:
    """Return the sizes of OpenAI's vision transformer, which open_clip's other models share."""
    width, channels, patch, _ = shapes["visual.conv1.weight"]
    return {
        "image_size": image_size or patch * isqrt(shapes["visual.positional_embedding"][0] - 1),
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "intermediate_size": shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": count_layers(shapes, "visual.transformer.resblocks."),
        "num_attention_heads": width // (head_width or 64),
    }


def _text_config(state_dict: Mapping[str, Tensor], act: str, heads: int | None) -> HfvlmCLIPTextConfig:
    prefix = "text." if "text.text_projection" in state_dict else ""
    shapes = {key.removeprefix(prefix): tensor.shape for key, tensor in state_dict.items() if key.startswith(prefix)}
    vocabulary, width = shapes["token_embedding.weight"]
    return HfvlmCLIPTextConfig(
        vocab_size=vocabulary,
        max_position_embeddings=shapes["positional_embedding"][0],
        hidden_size=width,
        intermediate_size=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        num_hidden_layers=count_layers(shapes, "transformer.resblocks."),
        num_attention_heads=heads or width // 64,
        hidden_act=act,
        projection_dim=shapes["text_projection"][1],
        **special_tokens(vocabulary),
    )


def settings_from_original(original: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the processor's settings, from open_clip's `preprocess_cfg` or transformers' preprocessor_config.json."""
    if "preprocess_cfg" in original:
        return {"image_processor": open_clip_pixels(original["preprocess_cfg"])}
    return {"image_processor": transformers_pixels(preprocessing)}


image_processor_for = sized(HfvlmCLIPImageProcessor)
processor_for = paired(HfvlmCLIPProcessor, image_processor_for, HfvlmCLIPTokenizer)
CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    settings_from_original=settings_from_original,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([VOCABULARIES]),
    export=interop.EXPORT,
)
