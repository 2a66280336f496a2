"""MaMMUT's released files: openMaMMUT's, from LAION's fork of open_clip.

Source: https://github.com/LAION-AI/open_clip_mammut at ed2d1f6.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion, always
from hfvlm.checkpoints.key_table import Row, scalar, transpose
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options, count_layers, original_config
from hfvlm.conversion.blocks import openai_layers, openai_vision_rows
from hfvlm.conversion.clip import VOCABULARIES, vision_sizes
from hfvlm.conversion.coca import DECODER, START, TOWER, UNUSED, settings_from_original
from hfvlm.conversion.processors import paired, sized, special_tokens
from hfvlm.models.mammut.configuration_mammut import (
    HfvlmMaMMUTConfig,
    HfvlmMaMMUTTextConfig,
    HfvlmMaMMUTVisionConfig,
)
from hfvlm.models.mammut.processing_mammut import (
    HfvlmMaMMUTImageProcessor,
    HfvlmMaMMUTProcessor,
    HfvlmMaMMUTTokenizer,
)


def keys_for(config: HfvlmMaMMUTConfig, layout: str = "open_clip", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for a file of `layout`, which is "open_clip"."""
    if layout != "open_clip":
        raise UnsupportedOriginalError("transformers has no MaMMUT; its files are open_clip's.")
    text = config.text_config
    layers = openai_layers("text.resblocks", "text_model.layers")
    if not text.grounded_mlp and len(text.grounded) == text.num_hidden_layers:
        layers = [row for row in layers if ".mlp." not in row.source and ".ln_2." not in row.source]
    return [
        Row("logit_scale", "logit_scale.scale", scalar),
        *openai_vision_rows("visual", "vision_model"),
        Row("map_viz2txt_kv", "projector.weight", transpose),
        Row("text.token_embedding.weight", "text_model.token.weight"),
        Row("text.positional_embedding", "text_model.position"),
        *layers,
        *openai_layers("text.cross_attn", "text_model.grounding_layers"),
        Row("text.cross_attn.{}.ln_1_kv.{}", "text_model.grounding_layers.{}.context_norm.{}"),
        Row("text.ln_final.{}", "text_model.post_norm.{}"),
        Row("text.text_projection", "text_model.lm_head.weight", transpose),
    ]


MODEL = (*START, "embed_dim", "vision_cfg", "text_cfg", "custom_text", "quick_gelu", "pad_id")
VISION = (*TOWER, "patch_dropout", "output_tokens", "pool_type", "final_ln_after_pool")
TEXT = (*DECODER, *UNUSED, "output_tokens", "cross_attn_ratio", "does_full_decoding", "has_mlp", "pad_id")


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmMaMMUTConfig:
    """Read openMaMMUT's model config; what it leaves out has the defaults of its classes."""
    original = original_config(original)
    vision, text = original["vision_cfg"], original["text_cfg"]
    check_options("openMaMMUT's model config", original, MODEL)
    check_options("openMaMMUT's vision_cfg", vision, VISION)
    check_options("openMaMMUT's text_cfg", text, TEXT)
    wanted = vision.get("pool_type") == "avg_all", vision.get("final_ln_after_pool"), text.get("does_full_decoding")
    if not all(wanted):
        raise UnsupportedOriginalError(
            "hfvlm implements MaMMUT with pool_type avg_all and final_ln_after_pool (of vision_cfg) and "
            "does_full_decoding (of text_cfg) alone, as all released checkpoints have them."
        )
    act = "quick_gelu" if original.get("quick_gelu") else "gelu"
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    return HfvlmMaMMUTConfig(
        vision_config=_vision_config(shapes, vision, act),
        text_config=_text_config(shapes, text, act, original.get("pad_id", 0)),
    )


def _vision_config(shapes: Mapping[str, Any], vision: Mapping[str, Any], act: str) -> HfvlmMaMMUTVisionConfig:
    return HfvlmMaMMUTVisionConfig(
        **vision_sizes(shapes, vision.get("head_width"), vision.get("image_size")),
        patch_dropout=vision.get("patch_dropout", 0.0),
        hidden_act=act,
        projection_dim=shapes["visual.proj"][1],
    )


def _text_config(shapes: Mapping[str, Any], text: Mapping[str, Any], act: str, pad: int) -> HfvlmMaMMUTTextConfig:
    rows, width = shapes["text.token_embedding.weight"]
    vocabulary = shapes["text.text_projection"][1]
    layers, grounded = (count_layers(shapes, f"text.{name}.") for name in ("resblocks", "cross_attn"))
    config = HfvlmMaMMUTTextConfig(
        vocab_size=vocabulary,
        token_rows=None if rows == vocabulary else rows,
        max_position_embeddings=shapes["text.positional_embedding"][0],
        hidden_size=width,
        intermediate_size=shapes["text.cross_attn.0.mlp.c_fc.weight"][0],
        num_hidden_layers=layers,
        num_attention_heads=text.get("heads", 8),
        hidden_act=act,
        grounding_interval=layers // grounded,
        grounded_mlp=text.get("has_mlp", True),
        **special_tokens(vocabulary, text.get("pad_id", pad)),
    )
    if len(config.grounded) != grounded:
        raise UnsupportedOriginalError(
            f"Its {grounded} cross-attentions do not follow {layers} layers at equal distances, as MaMMUT's do."
        )
    return config


image_processor_for = sized(HfvlmMaMMUTImageProcessor)
processor_for = paired(HfvlmMaMMUTProcessor, image_processor_for, HfvlmMaMMUTTokenizer)
CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=always("open_clip"),
    settings_from_original=settings_from_original,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([VOCABULARIES]),
)
