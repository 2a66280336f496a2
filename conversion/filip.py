"""FILIP's public reproduction: DeCLIP's training files.

Source: https://github.com/Sense-GVT/DeCLIP at 5d99a85. The paper's authors released Chinese models
alone, which `hfvlm.conversion.wukong` reads.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion, always
from hfvlm.checkpoints.key_table import Row, scalar, transpose
from hfvlm.checkpoints.originals import UnsupportedOriginalError, count_layers, original_config
from hfvlm.conversion.blocks import openai_layers, openai_tower
from hfvlm.conversion.clip import VOCABULARIES, vision_sizes
from hfvlm.conversion.processors import paired
from hfvlm.models.filip.configuration_filip import HfvlmFILIPConfig, HfvlmFILIPTextConfig, HfvlmFILIPVisionConfig
from hfvlm.models.filip.processing_filip import HfvlmFILIPImageProcessor, HfvlmFILIPProcessor, HfvlmFILIPTokenizer


def keys_for(config: HfvlmFILIPConfig, layout: str = "declip", keys: Collection[str] = ()) -> list[Row]:
    """Return the rows for a file of `layout`, which is "declip"."""
    prefix = prefix_of(keys)
    visual, text = f"{prefix}visual", f"{prefix}encode_text"
    return [
        Row(f"{prefix}logit_scale_dense", "logit_scale.scale", scalar),
        Row(f"{prefix}logit_scale", "summary_scale.scale"),
        *openai_tower(f"{visual}.", "vision_model"),
        Row(f"{prefix}image_mapping.{{}}", "vision_model.projection.{}"),
        Row(f"{visual}.ln_post.{{}}", "image_summary.norm.{}"),
        Row(f"{visual}.proj", "image_summary.projection.weight", transpose),
        Row(f"{text}.token_embedding.weight", "text_model.embeddings.token.weight"),
        Row(f"{text}.positional_embedding", "text_model.embeddings.position"),
        *openai_layers(f"{text}.transformer.resblocks", "text_model.layers"),
        Row(f"{text}.ln_final.{{}}", "text_model.post_norm.{}"),
        Row(f"{prefix}text_mapping.{{}}", "text_model.projection.{}"),
        Row(f"{text}.text_projection.{{}}", "text_summary.{}"),
        # For masked language modelling, whose loss had no weight.
        Row(f"{prefix}text_label_predictor.{{}}", None, optional=True),
    ]


def prefix_of(keys: Collection[str]) -> str:
    """Return "module.", which the training code's wrapper puts before every name, or nothing."""
    return "module." if keys and all(key.startswith("module.") for key in keys) else ""


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmFILIPConfig:
    """Read the constructor's arguments; none are needed."""
    original = original_config(original)
    image, text, model = (original.get(part, {}) for part in ("image_encode", "text_encode", "clip"))
    kind = text.get("text_encode_type", "Transformer")
    if kind != "Transformer" or not model.get("select_topk", True) or not model.get("return_dense", True):
        raise UnsupportedOriginalError(
            f"hfvlm's FILIP has a text tower of CLIP's kind and compares tokens: no {kind}, return_dense and "
            "select_topk must be on."
        )
    prefix = prefix_of(state_dict)
    shapes = {key.removeprefix(prefix): tensor.shape for key, tensor in state_dict.items()}
    if "visual.proj" not in shapes:
        raise UnsupportedOriginalError("hfvlm's FILIP has a vision transformer; this file has none (no visual.proj).")
    vision = vision_sizes(shapes, image_size=image.get("input_resolution"))
    words, text_width = shapes["encode_text.token_embedding.weight"]
    return HfvlmFILIPConfig(
        vision_config=HfvlmFILIPVisionConfig(
            **vision | {"num_attention_heads": image.get("heads", vision["num_attention_heads"])},
            projection_dim=shapes["image_mapping.weight"][0],
        ),
        text_config=HfvlmFILIPTextConfig(
            vocab_size=words,
            max_position_embeddings=shapes["encode_text.positional_embedding"][0],
            hidden_size=text_width,
            intermediate_size=shapes["encode_text.transformer.resblocks.0.mlp.c_fc.weight"][0],
            num_hidden_layers=count_layers(shapes, "encode_text.transformer.resblocks."),
            num_attention_heads=text.get("transformer_heads", text_width // 64),
            projection_dim=shapes["text_mapping.weight"][0],
            bos_token_id=words - 2,
            eos_token_id=words - 1,
        ),
        summary_dim=shapes["visual.proj"][1],
    )


def image_processor_for(config: HfvlmFILIPConfig, settings: Mapping[str, Any]) -> HfvlmFILIPImageProcessor:
    size = config.vision_config.image_size
    # 256 for 224: the short edge is an eighth longer than what is cut out.
    resized = max(size) if not isinstance(size, int) else size * 8 // 7
    defaults = {"size": size, "resized": resized}
    return HfvlmFILIPImageProcessor(**defaults | settings.get("image_processor", {}))


layout_of = always("declip")
processor_for = paired(HfvlmFILIPProcessor, image_processor_for, HfvlmFILIPTokenizer)
CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([VOCABULARIES]),
)
