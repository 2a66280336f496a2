"""SigLIP's and SigLIP 2's released files: open_clip's, big_vision's .npz, and transformers' folders.

Sources: https://github.com/google-research/big_vision at 0127fb6; https://github.com/mlfoundations/open_clip at
89fb801, with timm 1.0.20.
"""

from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.key_table import Change, Row, permute, reshape, scalar, split, transpose, unbatched, unstack
from hfvlm.conversion import (
    UnsupportedOriginalError,
    check_options,
    count_layers,
    original_config,
)
from hfvlm.conversion.clip import resblocks, transformers_layers
from hfvlm.conversion.clip import settings_from_original as settings_from_original
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
GEMMA_VOCABULARY = 256000
# Options of the original configurations that are read, or that say what this architecture always does.
TEXT_OPTIONS = (
    *(
        "context_length",
        "vocab_size",
        "hf_tokenizer_name",
        "tokenizer_kwargs",
        "width",
        "heads",
        "layers",
        "mlp_ratio",
    ),
    *("no_causal_mask", "proj_bias", "proj_type", "pool_type", "norm_kwargs", "act_kwargs"),
)
TIMM_OPTIONS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "act_layer")
TIMM_HEADS = {"base": 12, "large": 16, "so400m": 16, "giantopt": 16}


def layout_of(original: Mapping[str, Any]) -> str:
    if original.get("model_type") in ("siglip", "siglip2"):
        return "transformers"
    return "open_clip" if "vision_cfg" in original_config(original) else "big_vision"


def keys_for(config: HfvlmSigLIPConfig, layout: str = "open_clip", keys: Iterable[str] = ()) -> list[Row]:
    """The rows for a file of `layout`: "open_clip", "big_vision" or "transformers"."""
    tables = {"open_clip": open_clip_rows, "transformers": transformers_rows}
    return big_vision_rows(config, set(keys)) if layout == "big_vision" else tables[layout](config)


def open_clip_rows(config: HfvlmSigLIPConfig) -> list[Row]:
    source, target = "visual.trunk", "vision_model"
    block, layer = f"{source}.blocks.{{}}", f"{target}.layers.{{}}"
    pool, ours = f"{source}.attn_pool", f"{target}.pool"
    qkv = tuple(f"{layer}.attention.{part}_proj.{{}}" for part in "qkv")
    return [
        Row("logit_scale", "logit_scale.scale", scalar),
        Row("logit_bias", "logit_scale.bias", scalar),
        *(naflex_embeddings() if _naflex(config) else patch_embeddings()),
        Row(f"{block}.norm1.{{}}", f"{layer}.attention_norm.{{}}"),
        Row(f"{block}.attn.qkv.{{}}", qkv, split(3)),
        Row(f"{block}.attn.proj.{{}}", f"{layer}.attention.out_proj.{{}}"),
        Row(f"{block}.norm2.{{}}", f"{layer}.mlp_norm.{{}}"),
        Row(f"{block}.mlp.{{}}.{{}}", f"{layer}.mlp.{{}}.{{}}"),
        Row(f"{source}.norm.{{}}", f"{target}.post_norm.{{}}"),
        Row(f"{pool}.latent", f"{ours}.probe"),
        Row(f"{pool}.q.{{}}", f"{ours}.attention.q_proj.{{}}"),
        Row(f"{pool}.kv.{{}}", (f"{ours}.attention.k_proj.{{}}", f"{ours}.attention.v_proj.{{}}"), split(2)),
        Row(f"{pool}.proj.{{}}", f"{ours}.attention.out_proj.{{}}"),
        Row(f"{pool}.norm.{{}}", f"{ours}.mlp_norm.{{}}"),
        Row(f"{pool}.mlp.{{}}.{{}}", f"{ours}.mlp.{{}}.{{}}"),
        Row("text.token_embedding.weight", "text_model.embeddings.token.weight"),
        Row("text.positional_embedding", "text_model.embeddings.position"),
        *resblocks("text.transformer.resblocks", "text_model.layers"),
        Row("text.ln_final.{}", "text_model.post_norm.{}"),
        *([Row("text.text_projection.{}", "text_model.projection.{}")] if config.text_config.projection_dim else []),
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
    vision = [Row("params/img/pos_embedding", "vision_model.position", None if _naflex(config) else unbatched)]
    if _naflex(config):
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
    """A tower's layers, a set of arrays each or, where flax scanned over them, stacked into one set."""
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
    """Flax keeps the heads as an axis of their own: (width, heads, head size) in, (heads, head size, width) out."""
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


def transformers_rows(config: HfvlmSigLIPConfig) -> list[Row]:
    vision, text = "vision_model", "text_model"
    pool, ours = f"{vision}.head", f"{vision}.pool"
    naflex = _naflex(config)
    edge = isqrt(config.vision_config.num_patches) if naflex else 0
    table = Change(lambda t: t.unflatten(0, (edge, edge)), lambda t: t.flatten(0, 1)) if naflex else None
    patches = f"{vision}.patches" if naflex else f"{vision}.patches.projection"
    return [
        Row("logit_scale", "logit_scale.scale"),
        Row("logit_bias", "logit_scale.bias"),
        Row(f"{vision}.embeddings.patch_embedding.{{}}", f"{patches}.{{}}"),
        Row(f"{vision}.embeddings.position_embedding.weight", f"{vision}.position", table),
        *transformers_layers(vision),
        Row(f"{vision}.post_layernorm.{{}}", f"{vision}.post_norm.{{}}"),
        Row(f"{pool}.probe", f"{ours}.probe"),
        Row(f"{pool}.attention.in_proj_{{}}", tuple(f"{ours}.attention.{p}_proj.{{}}" for p in "qkv"), split(3)),
        Row(f"{pool}.attention.out_proj.{{}}", f"{ours}.attention.out_proj.{{}}"),
        Row(f"{pool}.layernorm.{{}}", f"{ours}.mlp_norm.{{}}"),
        Row(f"{pool}.mlp.{{}}.{{}}", f"{ours}.mlp.{{}}.{{}}"),
        Row(f"{text}.embeddings.token_embedding.weight", f"{text}.embeddings.token.weight"),
        Row(f"{text}.embeddings.position_embedding.weight", f"{text}.embeddings.position"),
        *transformers_layers(text),
        Row(f"{text}.final_layer_norm.{{}}", f"{text}.post_norm.{{}}"),
        Row(f"{text}.head.{{}}", f"{text}.projection.{{}}"),
    ]


def _naflex(config: HfvlmSigLIPConfig) -> bool:
    return isinstance(config.vision_config, HfvlmSigLIPNaFlexVisionConfig)


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmSigLIPConfig:
    """open_clip's model config, big_vision's constructor arguments, or transformers' config.json."""
    original = original_config(original)
    if original.get("model_type") in ("siglip", "siglip2"):
        return _from_transformers(original)
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    if "vision_cfg" in original:
        return _from_open_clip(original, shapes)
    return _from_big_vision(original, shapes)


def _from_open_clip(original: Mapping[str, Any], shapes: Mapping[str, Any]) -> HfvlmSigLIPConfig:
    vision, text = original["vision_cfg"], original["text_cfg"]
    check_options(
        "open_clip's text_cfg",
        text,
        TEXT_OPTIONS,
    )
    name, options = vision["timm_model_name"], vision.get("timm_model_kwargs", {})
    check_options(
        "open_clip's timm_model_kwargs",
        options,
        TIMM_OPTIONS,
    )
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
        vision_config: Any = HfvlmSigLIPNaFlexVisionConfig(patch_size=patch, num_patches=edge**2, **sizes)
    else:
        patch = shapes["visual.trunk.patch_embed.proj.weight"][-1]
        edge = isqrt(shapes["visual.trunk.pos_embed"][1])
        image_size = options.get("img_size", vision.get("image_size", patch * edge))
        vision_config = HfvlmSigLIPVisionConfig(patch_size=patch, image_size=image_size, **sizes)
    layer = "text.transformer.resblocks"
    return HfvlmSigLIPConfig(
        vision_config=vision_config,
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


def _from_transformers(original: Mapping[str, Any]) -> HfvlmSigLIPConfig:
    from transformers import CONFIG_MAPPING

    native = CONFIG_MAPPING[original["model_type"]](**original)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared = (*sizes, "hidden_act", "layer_norm_eps", "attention_dropout")
    vision, text = native.vision_config, native.text_config
    naflex = original["model_type"] == "siglip2"
    kind = HfvlmSigLIPNaFlexVisionConfig if naflex else HfvlmSigLIPVisionConfig
    extra = ("patch_size", "num_channels", "num_patches" if naflex else "image_size")
    return HfvlmSigLIPConfig(
        vision_config=kind(**{name: getattr(vision, name) for name in (*shared, *extra)}),
        text_config=HfvlmSigLIPTextConfig(
            projection_dim=text.projection_size,
            pad_token_id=0 if text.vocab_size == GEMMA_VOCABULARY else 1,
            eos_token_id=1,
            **{name: getattr(text, name) for name in (*shared, "vocab_size", "max_position_embeddings")},
        ),
    )


def image_processor_for(config: HfvlmSigLIPConfig, settings: Mapping[str, Any]) -> HfvlmImageProcessor:
    pixels = settings.get("image_processor", {})
    if not _naflex(config):
        return HfvlmSigLIPImageProcessor(**{"size": config.vision_config.image_size} | pixels)
    known = {name: pixels[name] for name in HfvlmSigLIPNaFlexImageProcessor.SETTINGS if name in pixels}
    return HfvlmSigLIPNaFlexImageProcessor(**{"patch_size": config.vision_config.patch_size} | known)


def processor_for(config: HfvlmSigLIPConfig, settings: Mapping[str, Any], vocabulary: Path) -> HfvlmSigLIPProcessor:
    """The processor; `vocabulary` is one of VOCABULARIES."""
    tokens: dict[str, Any] = {"model_max_length": config.text_config.max_position_embeddings}
    if config.text_config.pad_token_id == 0:
        tokens["pad_token"] = "<pad>"
    tokenizer = HfvlmSigLIPTokenizer.from_vocabulary(vocabulary, **tokens | settings.get("tokenizer", {}))
    return HfvlmSigLIPProcessor(image_processor_for(config, settings), tokenizer)


def config_to_transformers(config: HfvlmSigLIPConfig) -> Any:
    """transformers' SiglipConfig, or Siglip2Config for NaFlex, of the same model."""
    from transformers import Siglip2Config, SiglipConfig

    vision, text = config.vision_config.to_diff_dict(), config.text_config.to_diff_dict()
    if text.pop("projection_dim", None) is None:
        raise UnsupportedOriginalError("transformers' SiglipModel always has a text head; this model has none.")
    text["projection_size"] = config.text_config.projection_dim
    kind, name = (Siglip2Config, "siglip2") if _naflex(config) else (SiglipConfig, "siglip")
    return kind(
        architectures=[kind.__name__.replace("Config", "Model")],
        vision_config=vision | {"model_type": f"{name}_vision_model"},
        text_config=text | {"model_type": f"{name}_text_model"},
    )


def processor_to_transformers(processor: HfvlmSigLIPProcessor) -> Any:
    """transformers' processor of the same vocabulary and pixels.

    The vocabulary goes along as tokenizer.json: transformers' class for SigLIP 1 needs the sentencepiece file, which
    an hfvlm folder does not keep. Its cleaning is built in but for the repair of broken text (ftfy).
    """
    from tokenizers import Regex, Tokenizer, normalizers
    from transformers import Siglip2Processor, SiglipProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    pixels, tokens = processor.image_processor, processor.tokenizer
    shared = {"resample": pixels.resample, "image_mean": pixels.image_mean, "image_std": pixels.image_std}
    engine = Tokenizer.from_str(tokens.backend_tokenizer.to_str())
    steps: list[Any] = [normalizers.Lowercase()]
    if tokens.clean == "canonical":
        steps = [
            normalizers.Replace("_", " "),
            normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            *steps,
        ]
    engine.normalizer = normalizers.Sequence([*steps, *([engine.normalizer] if engine.normalizer else [])])
    tokenizer = TokenizersBackend(
        tokenizer_object=engine,
        eos_token=tokens.eos_token,
        pad_token=tokens.pad_token,
        model_max_length=tokens.model_max_length,
        model_input_names=["input_ids"],
    )
    if isinstance(pixels, HfvlmSigLIPNaFlexImageProcessor):
        sizes: dict[str, Any] = {"patch_size": pixels.patch_size, "max_num_patches": pixels.max_num_patches}
        return Siglip2Processor(Siglip2ImageProcessorPil(**sizes, **shared), tokenizer)
    return SiglipProcessor(SiglipImageProcessorPil(size=pixels.size, **shared), tokenizer)
