"""SigLIP's and SigLIP 2's released files: open_clip's, big_vision's .npz, and transformers' folders.

Sources: https://github.com/google-research/big_vision at 0127fb6; https://github.com/mlfoundations/open_clip at
89fb801, with timm 1.0.20.
"""

from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion, always
from hfvlm.checkpoints.key_table import Change, Row, permute, reshape, scalar, transpose, unbatched, unstack
from hfvlm.checkpoints.originals import check_options, count_layers, original_config
from hfvlm.conversion.blocks import openai_layers, timm_layers, timm_pool
from hfvlm.conversion.interop import siglip as interop
from hfvlm.conversion.interop.siglip import GEMMA_VOCABULARY, is_naflex
from hfvlm.conversion.processors import settings_from_original
from hfvlm.models.siglip.configuration_siglip import (
    HfvlmSigLIPConfig,
    HfvlmSigLIPNaFlexVisionConfig,
    HfvlmSigLIPTextConfig,
    HfvlmSigLIPVisionConfig,
)
from hfvlm.models.siglip.processing_siglip import (
    HfvlmSigLIPImageProcessor,
    HfvlmSigLIPNaFlexImageProcessor,
    HfvlmSigLIPProcessor,
    HfvlmSigLIPTokenizer,
)
from hfvlm.processing.images import HfvlmImageProcessor

VOCABULARIES = ("sentencepiece.model", "gemma_tokenizer.model", "spiece.model", "tokenizer.model", "tokenizer.json")
TANH, ERF = "gelu_pytorch_tanh", "gelu"
# timm's vision transformers that were registered with the tanh approximation; the others use the exact function,
# although all weights were trained with tanh.
TIMM_TANH = ("vit_base_patch32_siglip_256", "vit_large_patch16_siglip_512", "vit_so400m_patch16_", "vit_giantopt_")
# Options of the original configurations that are read, or that name what this architecture always does.
TEXT_OPTIONS = (
    *("context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "width", "heads", "layers"),
    *("mlp_ratio", "no_causal_mask", "proj_bias", "proj_type", "pool_type", "norm_kwargs", "act_kwargs"),
)
TIMM_OPTIONS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "act_layer")
TIMM_HEADS = {"base": 12, "large": 16, "so400m": 16, "giantopt": 16}


def layout_of(original: Mapping[str, Any]) -> str:
    if original.get("model_type") in ("siglip", "siglip2"):
        return "transformers"
    return "open_clip" if "vision_cfg" in original_config(original) else "big_vision"


def keys_for(config: HfvlmSigLIPConfig, layout: str = "open_clip", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for a file of `layout`: "open_clip", "big_vision" or "transformers"."""
    tables = {"open_clip": open_clip_rows, "transformers": interop.rows}
    return big_vision_rows(config, set(keys)) if layout == "big_vision" else tables[layout](config)


def open_clip_rows(config: HfvlmSigLIPConfig) -> list[Row]:
    return [
        Row("logit_scale", "logit_scale.scale", scalar),
        Row("logit_bias", "logit_scale.bias", scalar),
        *siglip_vision_rows(config.vision_config),
        Row("text.token_embedding.weight", "text_model.embeddings.token.weight"),
        Row("text.positional_embedding", "text_model.embeddings.position"),
        *openai_layers("text.transformer.resblocks", "text_model.layers"),
        Row("text.ln_final.{}", "text_model.post_norm.{}"),
        *([Row("text.text_projection.{}", "text_model.projection.{}")] if config.text_config.projection_dim else []),
    ]


def siglip_vision_rows(config: Any) -> list[Row]:
    """Return the rows of the vision tower in open_clip's files."""
    source, target = "visual.trunk", "vision_model"
    return [
        *(naflex_embeddings() if isinstance(config, HfvlmSigLIPNaFlexVisionConfig) else patch_embeddings()),
        *timm_layers(f"{source}.blocks", f"{target}.layers"),
        Row(f"{source}.norm.{{}}", f"{target}.post_norm.{{}}"),
        *timm_pool(f"{source}.attn_pool", f"{target}.pool"),
    ]


def patch_embeddings() -> list[Row]:
    return [
        Row("visual.trunk.patch_embed.proj.{}", "vision_model.patches.projection.{}"),
        Row("visual.trunk.pos_embed", "vision_model.position", unbatched),
    ]


def naflex_embeddings() -> list[Row]:
    return [
        Row("visual.trunk.embeds.proj.{}", "vision_model.patches.{}"),
        Row("visual.trunk.embeds.pos_embed", "vision_model.position", unbatched),
    ]


def big_vision_rows(config: HfvlmSigLIPConfig, keys: set[str]) -> list[Row]:
    vision = [Row("params/img/pos_embedding", "vision_model.position", None if is_naflex(config) else unbatched)]
    if is_naflex(config):
        vision += [Row("params/img/embedding/kernel", "vision_model.patches.weight", transpose)]
        vision += [Row("params/img/embedding/bias", "vision_model.patches.bias")]
    else:
        vision += [Row("params/img/embedding/kernel", "vision_model.patches.projection.weight", permute(3, 2, 0, 1))]
        vision += [Row("params/img/embedding/bias", "vision_model.patches.projection.bias")]
    pool, ours = "params/img/MAPHead_0", "vision_model.pool"
    return [
        Row("params/t", "logit_scale.scale"),
        Row("params/b", "logit_scale.bias"),
        *vision,
        *flax_encoder("params/img/Transformer", "vision_model", config.vision_config, keys),
        Row(f"{pool}/probe", f"{ours}.probe"),
        *flax_attention(f"{pool}/MultiHeadDotProductAttention_0", f"{ours}.attention", config.vision_config),
        *flax_norm(f"{pool}/LayerNorm_0", f"{ours}.mlp_norm"),
        *flax_mlp(f"{pool}/MlpBlock_0", f"{ours}.mlp"),
        Row("params/txt/Embed_0/embedding", "text_model.embeddings.token.weight"),
        Row("params/txt/pos_embedding", "text_model.embeddings.position", unbatched),
        *flax_encoder("params/txt/Encoder_0", "text_model", config.text_config, keys),
        *(flax_dense("params/txt/head", "text_model.projection") if config.text_config.projection_dim else []),
    ]


def flax_encoder(source: str, target: str, config: Any, keys: set[str]) -> list[Row]:
    """Return the rows of a tower's layers, a set of arrays each or, where flax scanned over them, stacked into one
    set."""
    depth = config.num_hidden_layers
    stacked = any(key.startswith(f"{source}/encoderblock/") for key in keys)
    block = f"{source}/encoderblock" if stacked else f"{source}/encoderblock_{{}}"
    layer = f"{target}.layers.{{}}"
    rows = [
        *flax_norm(f"{block}/LayerNorm_0", f"{layer}.attention_norm"),
        *flax_attention(f"{block}/MultiHeadDotProductAttention_0", f"{layer}.attention", config),
        *flax_norm(f"{block}/LayerNorm_1", f"{layer}.mlp_norm"),
        *flax_mlp(f"{block}/MlpBlock_0", f"{layer}.mlp"),
    ]
    if stacked:
        rows = [
            Row(row.source, tuple(str(row.target).replace("{}", str(i), 1) for i in range(depth)), unstack(row.change))
            for row in rows
        ]
    return [*rows, *flax_norm(f"{source}/encoder_norm", f"{target}.post_norm")]


def flax_attention(source: str, target: str, config: Any) -> list[Row]:
    """Return the rows of an attention, whose heads flax keeps as an axis of their own: (width, heads, head size) in,
    (heads, head size, width) out."""
    width = config.hidden_size
    into = Change(lambda kernel: kernel.reshape(width, width).t())
    return [
        *(
            row
            for theirs, part in (("query", "q"), ("key", "k"), ("value", "v"))
            for row in (
                Row(f"{source}/{theirs}/kernel", f"{target}.{part}_proj.weight", into),
                Row(f"{source}/{theirs}/bias", f"{target}.{part}_proj.bias", reshape(width)),
            )
        ),
        Row(f"{source}/out/kernel", f"{target}.out_proj.weight", into),
        Row(f"{source}/out/bias", f"{target}.out_proj.bias"),
    ]


def flax_mlp(source: str, target: str) -> list[Row]:
    return [*flax_dense(f"{source}/Dense_0", f"{target}.fc1"), *flax_dense(f"{source}/Dense_1", f"{target}.fc2")]


def flax_dense(source: str, target: str) -> list[Row]:
    return [Row(f"{source}/kernel", f"{target}.weight", transpose), Row(f"{source}/bias", f"{target}.bias")]


def flax_norm(source: str, target: str) -> list[Row]:
    return [Row(f"{source}/scale", f"{target}.weight"), Row(f"{source}/bias", f"{target}.bias")]


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmSigLIPConfig:
    """Read open_clip's model config, big_vision's constructor arguments, or transformers' config.json."""
    original = original_config(original)
    if original.get("model_type") in ("siglip", "siglip2"):
        return interop.config_from_transformers(original)
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    if "vision_cfg" in original:
        return _from_open_clip(original, shapes)
    return _from_big_vision(original, shapes)


def _from_open_clip(original: Mapping[str, Any], shapes: Mapping[str, Any]) -> HfvlmSigLIPConfig:
    text = original["text_cfg"]
    check_options("open_clip's text_cfg", text, TEXT_OPTIONS)
    layer = "text.transformer.resblocks"
    return HfvlmSigLIPConfig(
        vision_config=open_clip_vision_config(original["vision_cfg"], shapes),
        text_config=_text_config(
            shapes["text.token_embedding.weight"],
            shapes.get("text.text_projection.bias"),
            max_position_embeddings=shapes["text.positional_embedding"][0],
            intermediate_size=shapes[f"{layer}.0.mlp.c_fc.weight"][0],
            num_hidden_layers=count_layers(shapes, f"{layer}."),
            num_attention_heads=text["heads"],
            hidden_act=TANH if text.get("act_kwargs", {}).get("approximate") == "tanh" else ERF,
            layer_norm_eps=text.get("norm_kwargs", {}).get("eps", 1e-5),
        ),
    )


def open_clip_vision_config(
    vision: Mapping[str, Any], shapes: Mapping[str, Any]
) -> HfvlmSigLIPVisionConfig | HfvlmSigLIPNaFlexVisionConfig:
    """Read open_clip's `vision_cfg` and the shapes of the file."""
    name, options = vision["timm_model_name"], vision.get("timm_model_kwargs", {})
    check_options("open_clip's timm_model_kwargs", options, TIMM_OPTIONS)
    tanh = name.startswith((*TIMM_TANH, "naflexvit_")) or options.get("act_layer") == "gelu_tanh"
    layer = "visual.trunk.blocks"
    sizes = {
        "hidden_size": shapes["visual.trunk.norm.weight"][0],
        "intermediate_size": shapes[f"{layer}.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count_layers(shapes, f"{layer}."),
        "num_attention_heads": options.get("num_heads") or TIMM_HEADS[name.split("_")[1]],
        "hidden_act": TANH if tanh else ERF,
    }
    if "visual.trunk.embeds.pos_embed" in shapes:
        edge = shapes["visual.trunk.embeds.pos_embed"][1]
        patch = isqrt(shapes["visual.trunk.embeds.proj.weight"][1] // 3)
        return HfvlmSigLIPNaFlexVisionConfig(patch_size=patch, num_patches=edge**2, **sizes)
    patch = shapes["visual.trunk.patch_embed.proj.weight"][-1]
    edge = isqrt(shapes["visual.trunk.pos_embed"][1])
    image_size = options.get("img_size", vision.get("image_size", patch * edge))
    return HfvlmSigLIPVisionConfig(patch_size=patch, image_size=image_size, **sizes)


def _from_big_vision(original: Mapping[str, Any], shapes: Mapping[str, Any]) -> HfvlmSigLIPConfig:
    image, text = original["image"], original["text"]
    table, kernel = shapes["params/img/pos_embedding"], shapes["params/img/embedding/kernel"]
    sizes = _flax_sizes("params/img/Transformer", shapes, image["num_heads"])
    if len(kernel) == 2:
        vision_config: Any = HfvlmSigLIPNaFlexVisionConfig(
            patch_size=isqrt(kernel[0] // 3), num_patches=table[0] ** 2, **sizes
        )
    else:
        edge = isqrt(table[1])
        vision_config = HfvlmSigLIPVisionConfig(patch_size=kernel[0], image_size=kernel[0] * edge, **sizes)
    return HfvlmSigLIPConfig(
        vision_config=vision_config,
        text_config=_text_config(
            shapes["params/txt/Embed_0/embedding"],
            shapes.get("params/txt/head/bias"),
            max_position_embeddings=shapes["params/txt/pos_embedding"][1],
            **_flax_sizes("params/txt/Encoder_0", shapes, text["num_heads"]),
        ),
    )


def _flax_sizes(tower: str, shapes: Mapping[str, Any], heads: int) -> dict[str, Any]:
    stacked = f"{tower}/encoderblock/LayerNorm_0/bias"
    block = f"{tower}/encoderblock" if stacked in shapes else f"{tower}/encoderblock_0"
    return {
        "hidden_size": shapes[f"{tower}/encoder_norm/bias"][0],
        "intermediate_size": shapes[f"{block}/MlpBlock_0/Dense_0/bias"][-1],
        "num_hidden_layers": shapes[stacked][0]
        if stacked in shapes
        else len({key.split("/")[3] for key in shapes if key.startswith(f"{tower}/encoderblock_")}),
        "num_attention_heads": heads,
        "hidden_act": TANH,
    }


def _text_config(table: Any, head: Any, **sizes: Any) -> HfvlmSigLIPTextConfig:
    vocabulary, width = table
    return HfvlmSigLIPTextConfig(
        vocab_size=vocabulary,
        projection_dim=None if head is None else head[0],
        pad_token_id=0 if vocabulary == GEMMA_VOCABULARY else 1,
        eos_token_id=1,
        **{"hidden_size": width} | sizes,
    )


def image_processor_for(config: HfvlmSigLIPConfig, settings: Mapping[str, Any]) -> HfvlmImageProcessor:
    pixels = settings.get("image_processor", {})
    if not is_naflex(config):
        return HfvlmSigLIPImageProcessor(**{"size": config.vision_config.image_size} | pixels)
    known = {name: pixels[name] for name in HfvlmSigLIPNaFlexImageProcessor.SETTINGS if name in pixels}
    return HfvlmSigLIPNaFlexImageProcessor(**{"patch_size": config.vision_config.patch_size} | known)


def processor_for(config: HfvlmSigLIPConfig, settings: Mapping[str, Any], vocabulary: Path) -> HfvlmSigLIPProcessor:
    """Return the processor; `vocabulary` is one of VOCABULARIES."""
    tokens: dict[str, Any] = {"model_max_length": config.text_config.max_position_embeddings}
    if config.text_config.pad_token_id == 0:
        tokens["pad_token"] = "<pad>"
    tokenizer = HfvlmSigLIPTokenizer.from_vocabulary(vocabulary, **tokens | settings.get("tokenizer", {}))
    return HfvlmSigLIPProcessor(image_processor_for(config, settings), tokenizer)


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
