"""PaliGemma's, PaliGemma 2's and Gemma's files of big_vision (.npz), and the mask codes' (vae-oid.npz).

Source: https://github.com/google-research/big_vision at 0127fb6 (models/proj/paligemma, models/ppp/gemma.py,
evaluators/proj/paligemma/transfers/segmentation.py).
"""

from collections.abc import Callable, Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Gemma2Config, GemmaConfig, PreTrainedConfig

from hfvlm.checkpoints.conversion import Conversion, always
from hfvlm.checkpoints.key_table import Change, Row, permute, tied, unbatched
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options
from hfvlm.conversion.processors import check_vocabulary, sized
from hfvlm.conversion.siglip import flax_dense, flax_encoder
from hfvlm.models.paligemma.configuration_paligemma import (
    FULL,
    HfvlmPaliGemmaConfig,
    HfvlmPaliGemmaMaskConfig,
    HfvlmPaliGemmaVisionConfig,
)
from hfvlm.models.paligemma.processing_paligemma import (
    HfvlmPaliGemmaImageProcessor,
    HfvlmPaliGemmaProcessor,
    HfvlmPaliGemmaTokenizer,
)

VOCABULARIES = ("paligemma_tokenizer.model", "gemma_tokenizer.model", "tokenizer.model", "tokenizer.json")
# The width of Gemma 2 27B, the one size that scales queries by its width per head.
WIDTH_27B = 4608
# What big_vision's constructors take, and is read here or does not change what is computed.
GEMMA_OPTIONS = (
    *("variant", "width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "norm_eps", "vocab_size"),
    *("scan", "remat_policy", "post_norms", "final_logits_softcap", "attn_logits_softcap", "query_pre_attn_norm"),
    *("cache_dtype", "dropout", "dropout_bdims", "embed_dtype"),
)
IMAGE_OPTIONS = (
    *("variant", "patch_size", "width", "depth", "mlp_dim", "num_heads", "pool_type", "posemb", "scan"),
    *("head_zeroinit", "num_classes", "remat_policy", "dtype_mm", "dropout"),
)
Read = Callable[[Tensor], Any]


def layout_of(original: Mapping[str, Any]) -> str:
    """Tell the files apart by their options, or where there are none by the notes about them."""
    options = _options(original)
    if "encoder channels" in options or "vqvae" in options:
        return "mask"
    return "big_vision" if "img" in options or "gemma" not in options else "gemma"


def _options(original: Mapping[str, Any]) -> Mapping[str, Any]:
    return original.get("arguments") or original.get("config") or original


def keys_for(config: Any, layout: str = "big_vision", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for the file of a configuration: PaliGemma's, Gemma's alone, or the mask codes'."""
    keys = set(keys)
    if isinstance(config, HfvlmPaliGemmaMaskConfig):
        return [
            Row("encoder.{...}", "encoder.{...}"),
            Row("decoder.{...}", "decoder.{...}"),
            Row("_vq_vae._embedding", "codes"),
        ]
    start = "params/" if any(key.startswith("params/") for key in keys) else ""
    if not isinstance(config, HfvlmPaliGemmaConfig):
        return gemma_rows(start, "", config, keys)
    image = f"{start}img"
    return [
        Row(f"{image}/embedding/kernel", "vision_model.patches.projection.weight", permute(3, 2, 0, 1)),
        Row(f"{image}/embedding/bias", "vision_model.patches.projection.bias"),
        Row(f"{image}/pos_embedding", "vision_model.position", unbatched),
        *flax_encoder(f"{image}/Transformer", "vision_model", config.vision_config, keys),
        *flax_dense(f"{image}/head", "projector.layers.0"),
        *gemma_rows(f"{start}llm/", "language_model.", config.text_config, keys),
    ]


def gemma_rows(source: str, target: str, config: Any, keys: set[str]) -> list[Row]:
    """Return the rows of Gemma or Gemma 2, whose layers are one set of arrays, or one each where flax did not scan.

    Heads are an axis of their own: (heads, width, head size) in, (heads, head size, width) out. Norms are stored as
    what is added to 1, as in transformers.
    """
    width, second = config.hidden_size, isinstance(config, Gemma2Config)
    into: Read = lambda w: w.transpose(1, 2).reshape(-1, width)  # noqa: E731
    block = "self_attn.{}_proj.weight"
    grouped = config.num_attention_heads != config.num_key_value_heads
    rows: list[tuple[str, list[str], Read | None]] = [
        ("attn/attn_vec_einsum/w", [block.format("o")], lambda w: w.reshape(-1, width).t()),
        ("mlp/gating_einsum", [f"mlp.{part}_proj.weight" for part in ("gate", "up")], lambda w: tuple(w.mT)),
        ("mlp/linear", ["mlp.down_proj.weight"], lambda w: w.t()),
        ("pre_attention_norm/scale", ["input_layernorm.weight"], None),
        ("pre_ffw_norm/scale", [f"{'pre_feedforward' if second else 'post_attention'}_layernorm.weight"], None),
    ]
    if grouped:
        rows.append(("attn/q_einsum/w", [block.format("q")], into))
        rows.append(("attn/kv_einsum/w", [block.format(p) for p in "kv"], lambda w: tuple(map(into, w))))
    else:
        rows.append(("attn/qkv_einsum/w", [block.format(p) for p in "qkv"], lambda w: tuple(map(into, w))))
    if second:
        rows.append(("post_attention_norm/scale", ["post_attention_layernorm.weight"], None))
        rows.append(("post_ffw_norm/scale", ["post_feedforward_layernorm.weight"], None))
    scanned = any(key.startswith(f"{source}layers/attn/") for key in keys) or not keys
    made = [row for name, ours, read in rows for row in layer_rows(source, target, config, name, ours, read, scanned)]
    words = (f"{target}model.embed_tokens.weight", f"{target}lm_head.weight")
    return [
        Row(f"{source}embedder/input_embedding", words, tied(2)),
        *made,
        Row(f"{source}final_norm/scale", f"{target}model.norm.weight"),
    ]


def layer_rows(
    source: str,
    target: str,
    config: Any,
    name: str,
    ours: list[str],
    read: Read | None,
    scanned: bool,  # noqa: FBT001
) -> list[Row]:
    """Return the rows of an array of every layer: one row where they are stacked, else one for all numbers."""
    layers = f"{target}model.layers."
    if not scanned:
        change = None if read is None else Change(read)
        targets = tuple(f"{layers}{{}}.{own}" for own in ours)
        return [Row(f"{source}layers/{{}}/{name}", targets if len(targets) > 1 else targets[0], change)]
    every = tuple(f"{layers}{i}.{own}" for i in range(config.num_hidden_layers) for own in ours)

    def apart(array: Tensor) -> tuple[Tensor, ...]:
        parts = [layer if read is None else read(layer) for layer in array.unbind()]
        return tuple(one for part in parts for one in (part if isinstance(part, tuple) else (part,)))

    return [Row(f"{source}layers/{name}", every, Change(apart))]


# Configurations


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> PreTrainedConfig:
    """Read big_vision's constructor arguments, if they are at hand, and the shapes of the file.

    Raises:
        UnsupportedOriginalError: an option that changes what is computed, and is not known.
    """
    options = _options(original)
    shapes = {key.removeprefix("params/"): tensor.shape for key, tensor in state_dict.items()}
    if "_vq_vae._embedding" in shapes:
        return mask_config(shapes)
    gemma = options.get("gemma", {})
    check_options("big_vision's gemma", gemma, GEMMA_OPTIONS)
    if "embedder/input_embedding" in shapes:
        config = gemma_config(gemma, shapes, "")
        if isinstance(config, Gemma2Config):
            # Here the whole model runs, which caps its logits.
            config.final_logit_softcapping = gemma.get("final_logits_softcap", None if gemma else 30.0)
        config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
        return config
    image = options.get("img", {})
    check_options("big_vision's img", image, IMAGE_OPTIONS)
    if image.get("pool_type", "none") != "none" or image.get("posemb", "learn") != "learn":
        raise UnsupportedOriginalError(
            f"big_vision's img: pool_type {image.get('pool_type')!r} and posemb {image.get('posemb')!r}: PaliGemma's "
            "tower pools nothing ('none') and learns its positions ('learn')."
        )
    text = gemma_config(gemma, shapes, "llm/")
    return HfvlmPaliGemmaConfig(
        vision_config=vision_config(shapes),
        text_config=text,
        image_token_id=text.vocab_size,
        label_smoothing=options.get("label_smoothing", 0.0),
    )


def gemma_config(gemma: Mapping[str, Any], shapes: Mapping[str, Any], start: str) -> GemmaConfig | Gemma2Config:
    """Read the sizes of Gemma or Gemma 2. PaliGemma's logits are those that big_vision trains on, without a cap."""
    layers = f"{start}layers/" if f"{start}layers/mlp/linear" in shapes else f"{start}layers/0/"
    depth = shapes[f"{layers}mlp/linear"][0]
    if layers.endswith("0/"):
        own = f"{start}layers/"
        depth = len({key.removeprefix(own).split("/")[0] for key in shapes if key.startswith(own)})
    out = shapes[f"{layers}attn/attn_vec_einsum/w"]
    heads, head, width = out[-3:]
    grouped = shapes.get(f"{layers}attn/kv_einsum/w")
    sizes = {
        "vocab_size": shapes[f"{start}embedder/input_embedding"][0],
        "hidden_size": width,
        "intermediate_size": shapes[f"{layers}mlp/linear"][-2],
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if grouped is None else grouped[-3],
        "head_dim": head,
    }
    if gemma.get("norm_eps", 1e-6) != 1e-6:
        raise UnsupportedOriginalError(f"big_vision's gemma: norm_eps {gemma['norm_eps']}, where its code has 1e-6.")
    if f"{layers}post_ffw_norm/scale" not in shapes:
        caps = [name for name in ("final_logits_softcap", "attn_logits_softcap") if gemma.get(name)]
        if caps or gemma.get("query_pre_attn_norm", "rsqrt_head_dim") != "rsqrt_head_dim":
            raise UnsupportedOriginalError("big_vision's gemma: caps and query scales of Gemma 2 without its norms.")
        return GemmaConfig(**sizes)
    scale = gemma.get("query_pre_attn_norm", "rsqrt_emb_per_head" if width == WIDTH_27B else "rsqrt_head_dim")
    scales = {"rsqrt_head_dim": head, "rsqrt_emb_per_head": width // heads}
    if scale not in scales:
        raise UnsupportedOriginalError(f"big_vision's gemma: query_pre_attn_norm {scale!r} is none of {[*scales]}.")
    return Gemma2Config(
        **sizes,
        query_pre_attn_scalar=scales[scale],
        attn_logit_softcapping=gemma.get("attn_logits_softcap", None if gemma else 50.0),
        final_logit_softcapping=None,
        layer_types=[FULL] * depth,
    )


def vision_config(shapes: Mapping[str, Any]) -> HfvlmPaliGemmaVisionConfig:
    """Read the sizes of the tower."""
    tower = "img/Transformer"
    stacked = f"{tower}/encoderblock/LayerNorm_0/bias" in shapes
    block = f"{tower}/encoderblock" if stacked else f"{tower}/encoderblock_0"
    blocks = {key.split("/")[2] for key in shapes if key.startswith(f"{tower}/encoderblock_")}
    patch = shapes["img/embedding/kernel"][0]
    return HfvlmPaliGemmaVisionConfig(
        hidden_size=shapes["img/embedding/bias"][0],
        intermediate_size=shapes[f"{block}/MlpBlock_0/Dense_0/bias"][-1],
        num_hidden_layers=shapes[f"{block}/LayerNorm_0/bias"][0] if stacked else len(blocks),
        num_attention_heads=shapes[f"{block}/MultiHeadDotProductAttention_0/query/bias"][-2],
        patch_size=patch,
        image_size=patch * isqrt(shapes["img/pos_embedding"][1]),
    )


def mask_config(shapes: Mapping[str, Any]) -> HfvlmPaliGemmaMaskConfig:
    codes, width = shapes["_vq_vae._embedding"]
    return HfvlmPaliGemmaMaskConfig(
        encoder_channels=[shapes[f"encoder.{i}.weight"][0] for i in (0, 2, 4, 6)],
        decoder_channels=[shapes["decoder.0.weight"][0], *(shapes[f"decoder.{i}.weight"][1] for i in (4, 6, 8, 10))],
        code_dim=width,
        num_codes=codes,
    )


# Processors

images = sized(HfvlmPaliGemmaImageProcessor)


class NoImages:
    """In place of the image processor of a language model alone, or of the mask codes: there is nothing to save."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write nothing."""


def image_processor_for(config: Any, settings: Mapping[str, Any]) -> Any:
    """Return the image processor, `NoImages` for a model without a vision tower."""
    return images(config, settings) if isinstance(config, HfvlmPaliGemmaConfig) else NoImages()


def vocabularies_for(config: Any) -> list[tuple[str, ...]]:
    """Return the names of the tokenizer's file; masks have none."""
    return [] if isinstance(config, HfvlmPaliGemmaMaskConfig) else [VOCABULARIES]


def processor_for(config: Any, settings: Mapping[str, Any], *vocabulary: Path) -> Any:
    """Return the processor, of Gemma alone the tokenizer; `vocabulary` is Gemma's, with or without the pieces of
    regions. The mask codes have none."""
    if not vocabulary:
        return image_processor_for(config, settings)
    options = dict(settings.get("tokenizer", {}))
    if not isinstance(config, HfvlmPaliGemmaConfig):
        return HfvlmPaliGemmaTokenizer.from_vocabulary(*vocabulary, regions=False, **options)
    tokenizer = HfvlmPaliGemmaTokenizer.from_vocabulary(*vocabulary, **options)
    found = len(tokenizer) - 1  # the placeholder comes last
    check_vocabulary(vocabulary[0], found, config.text_config.vocab_size, "pieces are", "text_config.vocab_size")
    return HfvlmPaliGemmaProcessor(
        image_processor_for(config, settings), tokenizer, patch_size=config.vision_config.patch_size
    )


CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=vocabularies_for,
    settings_from_original=always({}),
)
