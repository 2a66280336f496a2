"""CLIP's released files: OpenAI's archives, open_clip's files of the same layout, and transformers' folders.

Sources: https://github.com/openai/CLIP at d05afc4, https://github.com/mlfoundations/open_clip at 89fb801.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion
from hfvlm.checkpoints.key_table import Row, scalar, transpose
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options, count_layers, original_config
from hfvlm.configuration import FOREIGN
from hfvlm.conversion.blocks import openai_layers, openai_vision_rows, transformers_vision_rows
from hfvlm.conversion.interop import clip as interop
from hfvlm.conversion.processors import paired, settings_from_original, sized, special_tokens
from hfvlm.conversion.siglip import open_clip_vision_config, siglip_vision_rows
from hfvlm.conversion.timm_towers import timm_config, timm_rows, wrapped_rows
from hfvlm.conversion.transformers_towers import (
    OPTIONS,
    encoder_config,
    encoder_rows,
    is_trunk,
    swin_config,
    swin_rows,
    trunk_config,
    trunk_rows,
)
from hfvlm.modeling.trunks import HfvlmTextTrunkConfig
from hfvlm.models.clip.configuration_clip import (
    HfvlmCLIPConfig,
    HfvlmCLIPResNetConfig,
    HfvlmCLIPTextConfig,
    HfvlmCLIPVisionConfig,
)
from hfvlm.models.clip.processing_clip import HfvlmCLIPImageProcessor, HfvlmCLIPProcessor, HfvlmCLIPTokenizer
from hfvlm.models.clip.processing_clip_variants import (
    HfvlmCLIPATokenizer,
    HfvlmCLIPNLLBTokenizer,
    HfvlmCLIPPaddedTokenizer,
    HfvlmCLIPRobertaTokenizer,
    HfvlmCLIPXLMTokenizer,
)
from hfvlm.models.clip.towers.configuration_timm import TimmVisionConfig
from hfvlm.models.clip.towers.configuration_variants import (
    HfvlmCLIPATextConfig,
    HfvlmCLIPAVisionConfig,
    HfvlmCLIPBidirectionalTextConfig,
    HfvlmMetaCLIP2TextConfig,
)
from hfvlm.models.siglip.configuration_siglip import HfvlmSigLIPConfig

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
    return [
        Row("logit_scale", "logit_scale.scale", scalar),
        # With SigLIP's loss.
        *([Row("logit_bias", "logit_scale.bias", scalar)] if hasattr(config, "logit_bias_init_value") else ()),
        *(Row(name, None, optional=True) for name in ARCHIVE_ENTRIES),
        *vision_rows(config.vision_config),
        *text_rows(config.text_config, keys),
    ]


def vision_rows(config: Any) -> list[Row]:
    """Return the rows of a vision tower in OpenAI's or open_clip's files."""
    if isinstance(config, TimmVisionConfig):
        return timm_rows(config)
    rows = VISION_ROWS.get(config.model_type)
    return rows(config) if rows else openai_vision_rows("visual", "vision_model")


def clipa_rows(config: HfvlmCLIPAVisionConfig) -> list[Row]:
    return [row for row in openai_vision_rows("visual", "vision_model") if ".ln_pre." not in row.source]


def text_rows(config: Any, keys: Iterable[str]) -> list[Row]:
    """Return the rows of a text tower in OpenAI's or open_clip's files, of which some keep it apart, as `text`."""
    if isinstance(config, HfvlmTextTrunkConfig):
        return encoder_rows(config)
    prefix = "text." if "text.text_projection" in set(keys) else ""
    return [
        Row(f"{prefix}token_embedding.weight", "text_model.embeddings.token.weight"),
        Row(f"{prefix}positional_embedding", "text_model.embeddings.position"),
        *openai_layers(f"{prefix}transformer.resblocks", "text_model.layers"),
        Row(f"{prefix}ln_final.{{}}", "text_model.post_norm.{}"),
        Row(f"{prefix}text_projection", "text_model.projection.weight", transpose),
    ]


def resnet_rows(config: HfvlmCLIPResNetConfig) -> list[Row]:
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


# By the model_type of a vision tower; others have OpenAI's.
VISION_ROWS: Mapping[str, Callable[[Any], list[Row]]] = {
    "hfvlm_clip_resnet": resnet_rows,
    "hfvlm_clipa_vision": clipa_rows,
    "hfvlm_siglip_vision": siglip_vision_rows,
    "hfvlm_timm_trunk": wrapped_rows,
    "hfvlm_vision_trunk": trunk_rows,
    "hfvlm_clip_swin": swin_rows,
    "hfvlm_clip_swin_v2": swin_rows,
}


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


def config_from_original(
    original: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> HfvlmCLIPConfig | HfvlmSigLIPConfig:
    """Read OpenAI's constructor arguments (none are needed), open_clip's model config, or transformers'
    config.json. Towers with a bias of their logits are a SigLIP."""
    encoder = original.get("text_model_config") or {}
    original = original_config(original)
    if original.get("model_type") == "clip":
        return interop.config_from_transformers(original)
    if "vision_cfg" in original:
        return _from_open_clip(original, encoder, state_dict)
    return HfvlmCLIPConfig(
        vision_config=_vision_config(state_dict, "quick_gelu"),
        text_config=_text_config(state_dict, "quick_gelu", original.get("transformer_heads")),
    )


def _from_open_clip(
    original: Mapping[str, Any], encoder: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> HfvlmCLIPConfig | HfvlmSigLIPConfig:
    known = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_bias")
    check_options("open_clip's model config", original, known)
    act = "quick_gelu" if original.get("quick_gelu") else "gelu"
    towers = {
        "vision_config": _open_clip_vision(original["vision_cfg"], act, state_dict),
        "text_config": _open_clip_text(original["text_cfg"], act, encoder, state_dict),
    }
    bias = original.get("init_logit_bias")
    return (
        HfvlmCLIPConfig(**towers) if bias is None else HfvlmSigLIPConfig(**towers, logit_bias_init_value=float(bias))
    )


def _open_clip_vision(vision: Mapping[str, Any], act: str, state_dict: Mapping[str, Tensor]) -> Any:
    name = str(vision.get("timm_model_name") or "")
    if "_siglip_" in name:
        check_options("open_clip's vision_cfg", vision, OPTIONS)
        return open_clip_vision_config(vision, {key: tensor.shape for key, tensor in state_dict.items()})
    if is_trunk(name):
        return trunk_config(vision, state_dict)
    if name.startswith(("swin_", "swinv2_")):
        return swin_config(vision, state_dict)
    if name:
        return timm_config(vision, state_dict)
    structure = {option: vision[option] for option in CLIPA_VISION if vision.get(option)}
    if structure not in ({}, CLIPA_VISION):
        raise UnsupportedOriginalError(
            f"open_clip's vision_cfg: {structure}; hfvlm implements these together, as CLIPA has them: {CLIPA_VISION}."
        )
    sizes = ("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio")
    check_options("open_clip's vision_cfg", vision, (*sizes, *CLIPA_VISION))
    config = _vision_config(state_dict, act, vision.get("head_width"), vision.get("image_size"))
    return HfvlmCLIPAVisionConfig(**_fields(config)) if structure else config


def _open_clip_text(
    text: Mapping[str, Any], act: str, encoder: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> Any:
    if text.get("hf_model_name"):
        return encoder_config(text, encoder, state_dict)
    sizes = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
    structure = ("pool_type", "no_causal_mask", "eos_id", "hf_tokenizer_name", "tokenizer_kwargs")
    check_options("open_clip's text_cfg", text, (*sizes, *structure))
    kind = (text.get("pool_type", "argmax"), bool(text.get("no_causal_mask")))
    if kind not in TEXT_TOWERS:
        raise UnsupportedOriginalError(
            f"open_clip's text_cfg: pool_type {kind[0]!r} with no_causal_mask {kind[1]}; hfvlm implements "
            f"{', '.join(f'{pool!r} with {mask}' for pool, mask in TEXT_TOWERS)}."
        )
    config = _text_config(state_dict, act, text.get("heads"))
    tokens = OWN_TOKENS.get(kind, {}) | ({"eos_token_id": text["eos_id"]} if "eos_id" in text else {})
    return TEXT_TOWERS[kind](**_fields(config) | tokens)


def _fields(config: Any) -> dict[str, Any]:
    """Return what a tower's configuration has of its own."""
    return {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in FOREIGN
    }


# CLIPA's vision tower, in open_clip's names.
CLIPA_VISION = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
# Text towers by open_clip's `pool_type` and `no_causal_mask`.
TEXT_TOWERS = {
    ("argmax", False): HfvlmCLIPTextConfig,
    ("argmax", True): HfvlmCLIPBidirectionalTextConfig,
    ("last", True): HfvlmCLIPATextConfig,
    ("eos", False): HfvlmMetaCLIP2TextConfig,
}
# Of BERT's vocabulary, and of XLM's.
OWN_TOKENS: Mapping[tuple[str, bool], dict[str, Any]] = {
    ("argmax", True): {"pad_token_id": 0},
    ("last", True): {"bos_token_id": 101, "eos_token_id": None, "pad_token_id": 0},
    ("eos", False): {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
}


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


image_processor_for = sized(HfvlmCLIPImageProcessor)
OPENAI = (HfvlmCLIPTokenizer, VOCABULARIES)
XLM = (HfvlmCLIPXLMTokenizer, ("sentencepiece.bpe.model", "tokenizer.json"))
# Tokenizers and names of their files, by the model_type of a text tower, or of its trunk.
TOKENIZERS: Mapping[str, tuple[Any, tuple[str, ...]]] = {
    "hfvlm_clip_text": OPENAI,
    "hfvlm_clip_bidirectional_text": (HfvlmCLIPPaddedTokenizer, VOCABULARIES),
    "hfvlm_clipa_text": (HfvlmCLIPATokenizer, ("vocab.txt", "tokenizer.json")),
    "hfvlm_metaclip2_text": XLM,
    "xlm-roberta": XLM,
    "roberta": (HfvlmCLIPRobertaTokenizer, ("vocab.json", "tokenizer.json")),
    "m2m_100": (HfvlmCLIPNLLBTokenizer, ("tokenizer.json",)),
}


def text_kind(config: Any) -> str:
    """Return the model_type of a model's text tower, or of its trunk."""
    text = config.text_config
    return text.trunk_config.model_type if isinstance(text, HfvlmTextTrunkConfig) else text.model_type


def processor_for(config: Any, settings: Mapping[str, Any], vocabulary: Path) -> HfvlmCLIPProcessor:
    """Return the processor; `vocabulary` is the tokenizer's original file."""
    kind, _ = TOKENIZERS[text_kind(config)]
    return paired(HfvlmCLIPProcessor, image_processor_for, kind)(config, settings, vocabulary)


def vocabularies_for(config: Any) -> list[tuple[str, ...]]:
    """Return the names of the tokenizer's file; none where hfvlm has no tokenizer."""
    kind = text_kind(config)
    return [TOKENIZERS[kind][1]] if kind in TOKENIZERS else []


CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    settings_from_original=settings_from_original,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=vocabularies_for,
    export=interop.EXPORT,
)
