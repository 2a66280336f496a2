"""Wukong's released files: Chinese CLIP, FILIP and Wukong.

Source: https://github.com/huawei-noah/Pretrained-Language-Model at 0598f02, Noah_WuKong (model/wukong.py).
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion, always
from hfvlm.checkpoints.key_table import Change, Row, scalar, transpose
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options, count_layers, original_config
from hfvlm.conversion import swin
from hfvlm.conversion.blocks import openai_layers, openai_vision_rows
from hfvlm.conversion.clip import vision_sizes
from hfvlm.conversion.processors import paired, sized
from hfvlm.modeling.trunks import HfvlmVisionTrunkConfig
from hfvlm.models.clip.configuration_clip import HfvlmCLIPVisionConfig
from hfvlm.models.wukong.configuration_wukong import (
    HfvlmWukongCLIPConfig,
    HfvlmWukongCLIPTextConfig,
    HfvlmWukongConfig,
    HfvlmWukongTextConfig,
    HfvlmWukongTrunkConfig,
    HfvlmWukongVisionConfig,
)
from hfvlm.models.wukong.processing_wukong import (
    HfvlmWukongImageProcessor,
    HfvlmWukongProcessor,
    HfvlmWukongTokenizer,
)

# Convolutions of one pixel, over a map, and the same over a sequence.
flattened = Change(lambda tensor: tensor.squeeze(-1), lambda tensor: tensor.unsqueeze(-1))
SCALE = "loss.logit_scale"
OPTIONS = ("type", "pretrained", "embed_dim", "visual", "text", "is_token_wise", "init_scale")
TEXT_OPTIONS = ("type", "context_length", "vocab_size", "width", "heads", "layers")
SWIN_OPTIONS = ("type", "name", "input_resolution", "token_reduction", *swin.OPTIONS)
VISION_OPTIONS = ("type", "input_resolution", "layers", "width", "patch_size", "token_reduction")


def keys_for(
    config: HfvlmWukongConfig | HfvlmWukongCLIPConfig, layout: str = "wukong", keys: Iterable[str] = ()
) -> list[Row]:
    """Return the rows for a file of `layout`, which is "wukong"."""
    text = "text_model"
    return [
        # The authors' evaluation, which has no temperature, leaves it out.
        Row(SCALE, "logit_scale.scale", scalar, optional=True),
        *vision_rows(config.vision_config),
        *reduction_rows(config, keys),
        Row("transformer.token_embedding.weight", f"{text}.embeddings.token.weight"),
        Row("transformer.positional_embedding", f"{text}.embeddings.position"),
        *openai_layers("transformer.resblocks", f"{text}.layers"),
        Row("transformer.ln_final.{}", f"{text}.post_norm.{{}}"),
        Row("transformer.text_projection", f"{text}.projection.weight", transpose),
    ]


def vision_rows(vision: Any) -> list[Row]:
    """Return the rows of a vision transformer, or of a Swin, whose head is the projection."""
    if not isinstance(vision, HfvlmVisionTrunkConfig):
        return openai_vision_rows("visual", "vision_model")
    return [
        *swin.swin_rows(vision.trunk_config.model_type, "microsoft", "visual.", "vision_model.trunk."),
        Row("visual.head.{}", "vision_model.projection.{}"),
    ]


def reduction_rows(config: HfvlmWukongConfig | HfvlmWukongCLIPConfig, keys: Iterable[str]) -> list[Row]:
    """Return the rows of the token reduction, which some files call the token learner."""
    if getattr(config, "num_image_tokens", None) is None:
        return []
    source = f"visual.{reduction_of(keys) or 'token_reduction'}"
    convolutions = {"attention_maps.0": "mix", "attention_maps.1": "weigh", "feat_conv": "value"}
    return [
        Row(f"{source}.norm.{{}}", "token_reduction.norm.{}"),
        *(
            Row(f"{source}.{theirs}.weight", f"token_reduction.{ours}.weight", flattened)
            for theirs, ours in convolutions.items()
        ),
    ]


def reduction_of(keys: Iterable[str]) -> str | None:
    """Return what a file calls the token reduction, None where it has none."""
    found = {key.split(".")[1] for key in keys if key.startswith(("visual.token_learner.", "visual.token_reduction."))}
    return found.pop() if found else None


def fresh_parameters(config: Any, layout: str, keys: Collection[str], expected: Collection[str]) -> list[str]:
    """Name the temperature, which a file need not have, and Swin's buffers."""
    scale = [] if SCALE in keys else ["logit_scale.scale"]
    return [*scale, *swin.fresh_parameters(config, "microsoft", keys, expected)]


def config_from_original(
    original: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> HfvlmWukongConfig | HfvlmWukongCLIPConfig:
    """Read the constructor's arguments; of these only `is_token_wise` is needed, where there is no token reduction."""
    original = original_config(original)
    visual, text = original.get("visual", {}), original.get("text", {})
    check_options("Wukong's constructor", original, OPTIONS if "visual" in original else ("is_token_wise",))
    check_options("Wukong's text", text, TEXT_OPTIONS)
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    reduction = reduction_of(shapes)
    token_wise = True if reduction else original.get("is_token_wise")
    if token_wise is None:
        raise UnsupportedOriginalError(
            "Its shapes do not say whether this file's embeddings are compared as vectors or token by token: name its "
            "preset (`hfvlm list wukong`), or give original={'is_token_wise': True} for FILIP, False for CLIP."
        )
    words = text_sizes(shapes, text.get("heads"))
    if token_wise:
        return HfvlmWukongConfig(
            vision_config=vision_config(shapes, visual, HfvlmWukongVisionConfig, HfvlmWukongTrunkConfig),
            text_config=HfvlmWukongTextConfig(**words),
            num_image_tokens=shapes[f"visual.{reduction}.attention_maps.1.weight"][0] if reduction else None,
        )
    return HfvlmWukongCLIPConfig(
        vision_config=vision_config(shapes, visual, HfvlmCLIPVisionConfig, HfvlmVisionTrunkConfig),
        text_config=HfvlmWukongCLIPTextConfig(**words),
    )


def vision_config(shapes: Mapping[str, Any], visual: Mapping[str, Any], transformer: Any, trunk: Any) -> Any:
    """Make the configuration of a vision tower, of either of two classes."""
    check_options("Wukong's token reduction", visual.get("token_reduction") or {}, ("num_tokens",))
    if "visual.head.weight" in shapes:
        check_options("Wukong's Swin", visual, SWIN_OPTIONS)
        sizes = swin.swin_config(visual, {key.removeprefix("visual."): shape for key, shape in shapes.items()})
        width = shapes["visual.head.weight"][0]
        return trunk(trunk_config=sizes, pooling="mean", projection_dim=width, projection_bias=True)
    check_options("Wukong's vision transformer", visual, VISION_OPTIONS)
    sizes = vision_sizes(shapes, image_size=visual.get("input_resolution"))
    return transformer(**sizes, projection_dim=shapes["visual.proj"][1])


def text_sizes(shapes: Mapping[str, Any], heads: int | None) -> dict[str, Any]:
    """Return the fields of a text transformer's configuration."""
    words, width = shapes["transformer.token_embedding.weight"]
    return {
        "vocab_size": words,
        "max_position_embeddings": shapes["transformer.positional_embedding"][0],
        "hidden_size": width,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": count_layers(shapes, "transformer.resblocks."),
        "num_attention_heads": heads or width // 64,
        "projection_dim": shapes["transformer.text_projection"][1],
    }


layout_of = always("wukong")
image_processor_for = sized(HfvlmWukongImageProcessor)
processor_for = paired(HfvlmWukongProcessor, image_processor_for, HfvlmWukongTokenizer)
CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([("vocab.txt", "tokenizer.json")]),
    fresh_parameters=fresh_parameters,
)
