"""DALL-E mini's and mega's files, in Flax and min-dalle's, their VQGAN's, and OpenAI's dVAE.

Source: https://github.com/borisdayma/dalle-mini at f0be4de, https://github.com/kuprel/min-dalle at 73621fb,
https://github.com/patil-suraj/vqgan-jax at 10ef240, https://github.com/CompVis/taming-transformers at 3ba01b2,
https://github.com/openai/DALL-E at 5be4b23.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import count
from math import log, sqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion, Names, Source, part_of
from hfvlm.checkpoints.key_table import Change, Row, Table, transpose, unstack
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options, count_layers
from hfvlm.conversion.dvae import codebook_rows
from hfvlm.conversion.processors import check_vocabulary
from hfvlm.conversion.vqgan import vqgan_config, vqgan_defaults, vqgan_rows
from hfvlm.models.dalle_mini.configuration_dalle_mini import (
    HfvlmDALLEMiniConfig,
    HfvlmDALLEMiniDecoderConfig,
    HfvlmDALLEMiniDVAEConfig,
    HfvlmDALLEMiniTextConfig,
    HfvlmDALLEMiniVQGANConfig,
)
from hfvlm.models.dalle_mini.processing_dalle_mini import (
    HfvlmDALLEMiniImageProcessor,
    HfvlmDALLEMiniProcessor,
    HfvlmDALLEMiniTokenizer,
)

AnyConfig = HfvlmDALLEMiniConfig | HfvlmDALLEMiniVQGANConfig | HfvlmDALLEMiniDVAEConfig
VOCABULARIES = ("tokenizer.json", "vocab_mini.json", "vocab.json")
PARTS = {
    "codec": "the VQGAN: flax_model.msgpack of dalle-mini/vqgan_imagenet_f16_16384, min-dalle's detoker.pt, or "
    "taming-transformers' .ckpt"
}
FILES: dict[str, dict[str, Names]] = {
    "min-dalle": {"main": ("encoder_mini.pt", "encoder.pt"), "decoder": ("decoder_mini.pt", "decoder.pt")},
    "openai": {"main": ("encoder.pkl",), "decoder": ("decoder.pkl",)},
}
# min-dalle starts with its last code.
MIN_DALLE_CODES = 2**14
VARIANTS = (
    *("use_bias", "ln_type", "ln_positions", "use_head_scale", "use_cosine_attention", "tau_init"),
    *("use_absolute_position_embeddings", "use_swin_position_embeddings", "use_deepnet_scaling", "use_subln_init"),
    *("use_glu", "use_alibi", "sinkhorn_iters", "use_final_ln_encoder", "use_final_ln_decoder", "force_ln_scale"),
    *("activation_function", "dropout", "attention_dropout", "activation_dropout", "init_std", "scale_embedding"),
)
SIZES = (
    *("encoder_vocab_size", "image_vocab_size", "image_length", "max_text_length", "d_model", "encoder_layers"),
    *("encoder_ffn_dim", "encoder_attention_heads", "decoder_layers", "decoder_ffn_dim", "decoder_attention_heads"),
    *("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id"),
)
# What says how the original is run, stored or trained, and nothing about its weights.
BESIDE = (
    *("gradient_checkpointing", "use_cache", "use_scan", "max_length", "min_length", "normalize_text", "do_sample"),
    *(
        "is_encoder_decoder",
        "tie_word_embeddings",
        "forced_eos_token_id",
        "model_type",
        "architectures",
        "torch_dtype",
    ),
    *("transformers_version", "_name_or_path", "codec_config"),
)
OPTIONS = (*SIZES, *VARIANTS, *BESIDE)
MIN_DALLE_OPTIONS = (
    *("layer_count", "embed_count", "attention_head_count", "text_vocab_count", "text_token_count"),
    *("glu_embed_count", "image_vocab_count", "start_token"),
)
DVAE_OPTIONS = {
    "encoder": ("group_count", "n_hid", "n_blk_per_group", "input_channels", "vocab_size"),
    "decoder": ("group_count", "n_init", "n_hid", "n_blk_per_group", "output_channels", "vocab_size"),
}

heads = Change(lambda tensor: tensor.flatten(), lambda tensor: tensor.reshape(1, 1, -1, 1))


# The tables


def keys_for(config: AnyConfig, layout: str = "flax", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for a file: of `layout` "flax" or "min-dalle", both parts under `encoder.` and `decoder.`; of
    the codecs, whatever `keys` are."""
    keys = list(keys)
    if isinstance(config, HfvlmDALLEMiniVQGANConfig):
        return vqgan_rows(config, keys)
    if isinstance(config, HfvlmDALLEMiniDVAEConfig):
        return [*dvae_rows(config, "encoder", "encoder."), *dvae_rows(config, "decoder", "decoder.")]
    if layout == "min-dalle":
        return [*min_dalle_rows("encoder", "encoder."), *min_dalle_rows("decoder", "decoder.")]
    return [*flax_rows("encoder", config.text_config, keys), *flax_rows("decoder", config.decoder_config, keys)]


OURS = {"encoder": "text_model", "decoder": "image_decoder"}


def flax_rows(half: str, config: HfvlmDALLEMiniTextConfig, keys: Collection[str]) -> list[Row]:
    """Return the rows of an encoder or a decoder, whose layers are a set of arrays each or, where flax scanned over
    them, stacked into one set. Norms before linear layers may have no scale."""
    source, target, kind = f"model/{half}", OURS[half], half.title()
    stacked = any(key.startswith(f"{source}/layers/FlaxBart{kind}Layers/") for key in keys)
    block = f"{source}/layers/FlaxBart{kind}Layer{'s' if stacked else '_{}'}"
    rows = layer_rows(block, f"{target}.layers.{{}}", config, decoder=half == "decoder")
    if stacked:
        numbers = range(config.num_hidden_layers)
        rows = [
            row._replace(
                target=tuple(str(row.target).replace("{}", str(i), 1) for i in numbers), change=unstack(row.change)
            )
            for row in rows
        ]
    embeddings = f"{target}.embeddings"
    rows += [
        Row(f"{source}/embed_tokens/embedding", f"{embeddings}.token.weight"),
        *norm_rows(config, f"{source}/layernorm_embedding", f"{embeddings}.norm"),
    ]
    if config.absolute_positions:
        rows.append(Row(f"{source}/embed_positions/embedding", f"{embeddings}.position"))
    if config.final_norm:
        rows += norm_rows(config, f"{source}/final_ln", f"{target}.final_norm")
    return [*rows, *([Row("lm_head/kernel", f"{target}.lm_head.weight", transpose)] if half == "decoder" else [])]


def norm_rows(config: HfvlmDALLEMiniTextConfig, source: str, target: str, *, optional: bool = False) -> list[Row]:
    rows = [Row(f"{source}/scale", f"{target}.weight", optional=True)]
    return rows if config.norm_type == "rmsnorm" else [*rows, Row(f"{source}/bias", f"{target}.bias", None, optional)]


def linear_rows(config: HfvlmDALLEMiniTextConfig, source: str, target: str) -> list[Row]:
    rows = [Row(f"{source}/kernel", f"{target}.weight", transpose)]
    return [*rows, Row(f"{source}/bias", f"{target}.bias")] if config.bias else rows


def layer_rows(block: str, target: str, config: HfvlmDALLEMiniTextConfig, *, decoder: bool) -> list[Row]:
    """Return the rows of a layer. Flax numbers those norms of a module that there are."""
    norms, subln = config.norms, config.norms == "subln"
    before, after = norms in ("normformer", "cogview", "preln"), norms in ("normformer", "cogview", "swinv2")
    outer = {"attention_norm": before or (subln and not decoder), "attention_out_norm": after}
    outer |= {"context_norm": before, "context_out_norm": after} if decoder else {}
    outer |= {"stream_norm": norms == "swinv2"}
    inner = {"norm": norms != "swinv2", "mid_norm": norms in ("normformer", "subln")}
    inner |= {"out_norm": norms in ("cogview", "swinv2")}
    mlp = f"{block}/{'GLU' if config.gated else 'FFN'}_0"
    rows = [*numbered(config, block, target, outer), *numbered(config, mlp, f"{target}.mlp", inner)]
    for i, ours in enumerate(("fc1", "gate", "fc2") if config.gated else ("fc1", "fc2")):
        rows += linear_rows(config, f"{mlp}/Dense_{i}", f"{target}.mlp.{ours}")
    for i, ours in enumerate(("attention", "cross_attention") if decoder else ("attention",)):
        theirs, here = f"{block}/FlaxBartAttention_{i}", f"{target}.{ours}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            rows += linear_rows(config, f"{theirs}/{part}", f"{here}.{part}")
        rows += [Row(f"{theirs}/head_scale", f"{here}.head_scale", heads)] if config.head_scale else []
        rows += [relative_row(config, theirs, here)] if config.relative_positions else []
        rows += norm_rows(config, f"{theirs}/mid_layernorm", f"{here}.mid_norm") if subln and not i else []
    return rows


def relative_row(config: HfvlmDALLEMiniTextConfig, source: str, target: str) -> Row:
    count = config.num_attention_heads
    apart = Change(lambda table: table.unflatten(1, (-1, count)), lambda table: table.flatten(1))
    return Row(f"{source}/rel_bias/embedding", f"{target}.relative.bias", apart)


def numbered(config: HfvlmDALLEMiniTextConfig, source: str, target: str, norms: Mapping[str, bool]) -> Iterator[Row]:
    kind, number = "RMSNorm" if config.norm_type == "rmsnorm" else "LayerNorm", count()
    for ours in (name for name, there in norms.items() if there):
        # Few layers have the norm of the stream, or none.
        yield from norm_rows(
            config, f"{source}/{kind}_{next(number)}", f"{target}.{ours}", optional=ours == "stream_norm"
        )


def min_dalle_rows(half: str, source: str = "") -> list[Row]:
    """Return the rows of min-dalle's encoder or decoder, which are NormFormer's. Its files lack the weights of norms
    that have no scale in Flax."""
    target, layer, ours = OURS[half], f"{source}layers.{{}}", f"{OURS[half]}.layers.{{}}"
    rows = [
        Row(f"{source}embed_tokens.weight", f"{target}.embeddings.token.weight"),
        Row(f"{source}embed_positions.weight", f"{target}.embeddings.position"),
        Row(f"{source}layernorm_embedding.{{}}", f"{target}.embeddings.norm.{{}}"),
        *unscaled(f"{source}final_ln", f"{target}.final_norm"),
        *unscaled(f"{layer}.pre_self_attn_layer_norm", f"{ours}.attention_norm"),
        Row(f"{layer}.self_attn.{{}}.weight", f"{ours}.attention.{{}}.weight"),
        Row(f"{layer}.self_attn_layer_norm.{{}}", f"{ours}.attention_out_norm.{{}}"),
        *unscaled(f"{layer}.glu.ln0", f"{ours}.mlp.norm"),
        *unscaled(f"{layer}.glu.ln1", f"{ours}.mlp.mid_norm"),
        *(
            Row(f"{layer}.glu.{theirs}.weight", f"{ours}.mlp.{name}.weight")
            for theirs, name in (("fc0", "fc1"), ("fc1", "gate"), ("fc2", "fc2"))
        ),
    ]
    if half == "encoder":
        return rows
    return [
        *rows,
        *unscaled(f"{layer}.pre_encoder_attn_layer_norm", f"{ours}.context_norm"),
        Row(f"{layer}.encoder_attn.{{}}.weight", f"{ours}.cross_attention.{{}}.weight"),
        Row(f"{layer}.encoder_attn_layer_norm.{{}}", f"{ours}.context_out_norm.{{}}"),
        Row(f"{source}lm_head.weight", f"{target}.lm_head.weight"),
    ]


def unscaled(source: str, target: str) -> list[Row]:
    return [Row(f"{source}.weight", f"{target}.weight", optional=True), Row(f"{source}.bias", f"{target}.bias")]


def dvae_rows(config: HfvlmDALLEMiniDVAEConfig, half: str, source: str = "") -> list[Row]:
    """Return the rows of the dVAE's encoder or decoder."""
    if half == "encoder":
        return codebook_rows(config.blocks_per_group, source=source, target="encoder.")
    changed = config.decoder_input_size != 8 * config.decoder_hidden_size
    return codebook_rows(config.decoder_blocks_per_group, source=source, target="decoder.", changed=changed)


def compose(config: AnyConfig, layout: str, sources: Mapping[str, Source]) -> list[Table]:
    main = sources["main"].tensors
    if isinstance(config, HfvlmDALLEMiniDVAEConfig):
        halves = {"encoder": main, "decoder": sources["decoder"].tensors}
        return [Table(tensors, dvae_rows(config, half), half) for half, tensors in halves.items()]
    if isinstance(config, HfvlmDALLEMiniVQGANConfig):
        return [Table(main, vqgan_rows(config, main))]
    tables = [Table(main, keys_for(config, layout, main))]
    if layout == "min-dalle":
        halves = {"encoder": main, "decoder": sources["decoder"].tensors}
        tables = [Table(tensors, min_dalle_rows(half), half) for half, tensors in halves.items()]
    if config.codec_config is not None:
        codec = part_of(sources, "codec", PARTS)
        tables.append(Table(codec, vqgan_rows(config.codec_config, codec, "codec."), "codec"))
    return tables


def fresh_parameters(config: AnyConfig, layout: str, keys: Collection[str], expected: Collection[str]) -> list[str]:
    """Name the weights of norms that have none in the file: they are ones. min-dalle's decoder lacks those that its
    encoder, the main file, lacks."""
    if not isinstance(config, HfvlmDALLEMiniConfig):
        return []
    rows = keys_for(config, layout, keys)
    if layout == "min-dalle" and "embed_tokens.weight" in keys:
        there = "final_ln.weight" in keys
        targets = [] if there else [row.target for row in rows if row.optional]
    else:
        targets = [row.target for row in rows if row.optional and not any(map(pattern(row.source).fullmatch, keys))]
    flat = [name for target in targets for name in (target if isinstance(target, tuple) else (target,))]
    patterns = [pattern(str(name)) for name in flat]
    return [name for name in expected if any(each.fullmatch(name) for each in patterns)]


def pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", "[^./]+"))


# The configurations


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> AnyConfig:
    """Read the original's configuration, under `config` where a golden case records it, and the shapes."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    outer, original = original, original.get("config", original)
    if any(key.startswith(("post_quant_conv", "decoder/conv_in")) for key in shapes):
        return vqgan_config(original, shapes)
    if "encoder.blocks.input.w" in shapes:
        return dvae_config(original, shapes)
    if "lm_head/kernel" in shapes:
        return flax_config(original, shapes)
    if "encoder.embed_tokens.weight" in shapes:
        start = {name: outer[name] for name in ("start_token",) if name in outer}
        return min_dalle_config({**original, **start}, shapes)
    raise UnsupportedOriginalError(
        "It has two files, of which one does not say what the other is: name its preset (`hfvlm list dalle_mini`)."
    )


def flax_config(original: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> HfvlmDALLEMiniConfig:
    check_options("DALL-E mini's configuration", original, OPTIONS)
    check_runs(original)
    layers = {half: layers_of(half, shapes, original) for half in OURS}
    shared = variants(original)
    rows, width = shapes["model/decoder/embed_tokens/embedding"]
    words = shapes["model/encoder/embed_tokens/embedding"][0]
    start = original.get("decoder_start_token_id", rows - 1)
    length, codes = (
        shapes.get(f"model/{half}/embed_positions/embedding", (original.get(name, default),))[0]
        for half, name, default in (("encoder", "max_text_length", 64), ("decoder", "image_length", 256))
    )
    alpha, gain = residual_scales(original, layers["encoder"], layers["decoder"])
    codec = original.get("codec_config")
    return HfvlmDALLEMiniConfig(
        initializer_range=original.get("init_std", 0.02),
        text_config=HfvlmDALLEMiniTextConfig(
            **shared,
            vocab_size=words,
            hidden_size=width,
            max_position_embeddings=length,
            num_hidden_layers=layers["encoder"],
            num_attention_heads=original.get("encoder_attention_heads", 16),
            intermediate_size=wide(original, shapes, "encoder"),
            sinkhorn_iterations=original.get("sinkhorn_iters", 1),
            final_norm=original.get("use_final_ln_encoder", True),
            residual_scale=alpha["encoder"],
            init_gain=gain["encoder"],
        ),
        decoder_config=HfvlmDALLEMiniDecoderConfig(
            **shared,
            vocab_size=rows,
            hidden_size=width,
            max_position_embeddings=codes,
            context_length=length,
            num_hidden_layers=layers["decoder"],
            num_attention_heads=original.get("decoder_attention_heads", 16),
            intermediate_size=wide(original, shapes, "decoder"),
            residual_scale=alpha["decoder"],
            init_gain=gain["decoder"],
            bos_token_id=start,
            pad_token_id=original.get("pad_token_id", rows - 1),
            eos_token_id=original.get("eos_token_id", rows - 1),
        ),
        codec_config=None if codec is None else vqgan_defaults(codec),
    )


def check_runs(original: Mapping[str, Any]) -> None:
    """Refuse what does not run in the original."""
    broken = {
        "ln_positions": original.get("ln_positions") in ("postln", "deepnet"),
        "use_final_ln_decoder": not original.get("use_final_ln_decoder", True),
        "tie_word_embeddings": bool(original.get("tie_word_embeddings")),
        "use_alibi": bool(original.get("use_alibi")),
    }
    if found := [f"{name}={original[name]!r}" for name, wrong in broken.items() if wrong]:
        raise UnsupportedOriginalError(
            f"DALL-E mini's configuration: {', '.join(found)}: the original does not run so."
        )


def variants(original: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "initializer_range": original.get("init_std", 0.02),
        "norms": original.get("ln_positions", "normformer"),
        "norm_type": original.get("ln_type", "layernorm"),
        "activation": original.get("activation_function", "gelu"),
        "gated": original.get("use_glu", True),
        "bias": original.get("use_bias", False),
        "head_scale": original.get("use_head_scale", False),
        "cosine_temperature": original.get("tau_init", 0.05) if original.get("use_cosine_attention") else None,
        "absolute_positions": original.get("use_absolute_position_embeddings", True),
        "relative_positions": original.get("use_swin_position_embeddings", False),
        "scale_embedding": original.get("scale_embedding", False),
        "hidden_dropout": original.get("dropout", 0.1),
        "attention_dropout": original.get("attention_dropout", 0.0),
        "activation_dropout": original.get("activation_dropout", 0.0),
    }


def layers_of(half: str, shapes: Mapping[str, tuple[int, ...]], original: Mapping[str, Any]) -> int:
    prefix = f"model/{half}/layers/FlaxBart{half.title()}Layer"
    scanned = next((shape[0] for key, shape in shapes.items() if key.startswith(f"{prefix}s/")), None)
    return scanned or count_layers((key.replace("/", ".") for key in shapes), f"{prefix}_".replace("/", "."))


def wide(original: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], half: str) -> int:
    name = next(key for key in shapes if f"/{half}/" in key and re.search(r"/(GLU|FFN)_0/Dense_0/kernel$", key))
    return shapes[name][-1]


def residual_scales(
    original: Mapping[str, Any], encoder: int, decoder: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the factors of the residual stream, and those of initial weights, of both halves: DeepNet's, sub-LN's, or
    none."""
    plain = {"encoder": 1.0, "decoder": 1.0}
    if original.get("use_deepnet_scaling"):
        depth = (encoder**4 * decoder) ** 0.0625
        alpha = {"encoder": 0.81 * depth, "decoder": (3 * decoder) ** 0.25}
        return alpha, {"encoder": 0.87 / depth, "decoder": (12 * decoder) ** -0.25}
    if original.get("use_subln_init"):
        three = log(3 * decoder)
        return plain, {"encoder": sqrt(three * log(2 * encoder) / 3), "decoder": sqrt(three)}
    return plain, plain


def min_dalle_config(original: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> HfvlmDALLEMiniConfig:
    check_options("min-dalle", original, MIN_DALLE_OPTIONS)
    rows, width = shapes["decoder.embed_tokens.weight"]
    words, length = shapes["encoder.embed_tokens.weight"][0], shapes["encoder.embed_positions.weight"][0]
    start = original.get("start_token", min(MIN_DALLE_CODES, rows - 1) - 1)
    shared = {"hidden_size": width, "num_attention_heads": original.get("attention_head_count", width // 64)}
    return HfvlmDALLEMiniConfig(
        text_config=HfvlmDALLEMiniTextConfig(
            **shared,
            vocab_size=words,
            max_position_embeddings=length,
            num_hidden_layers=count_layers(shapes, "encoder.layers."),
            intermediate_size=shapes["encoder.layers.0.glu.fc0.weight"][0],
        ),
        decoder_config=HfvlmDALLEMiniDecoderConfig(
            **shared,
            vocab_size=rows,
            max_position_embeddings=shapes["decoder.embed_positions.weight"][0],
            context_length=length,
            num_hidden_layers=count_layers(shapes, "decoder.layers."),
            intermediate_size=shapes["decoder.layers.0.glu.fc0.weight"][0],
            bos_token_id=start,
            pad_token_id=start,
            eos_token_id=None,
        ),
        guidance_scale=16.0,
    )


def dvae_config(original: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> HfvlmDALLEMiniDVAEConfig:
    for half, known in DVAE_OPTIONS.items():
        options = original.get(half, {})
        check_options(f"The dVAE's {half}", options, known)
        if options.get("group_count", 4) != 4:
            raise UnsupportedOriginalError(f"The dVAE's {half}: hfvlm's has four groups.")
    codes, width = shapes["encoder.blocks.output.conv.w"][:2]
    return HfvlmDALLEMiniDVAEConfig(
        num_channels=shapes["encoder.blocks.input.w"][1],
        hidden_size=width // 8,
        decoder_hidden_size=shapes["decoder.blocks.output.conv.w"][1],
        decoder_input_size=shapes["decoder.blocks.input.w"][0],
        blocks_per_group=count_layers(shapes, "encoder.blocks.group_1."),
        decoder_blocks_per_group=count_layers(shapes, "decoder.blocks.group_1."),
        num_codes=codes,
    )


def layout_of(original: Mapping[str, Any]) -> str:
    """Return "min-dalle" where the configuration is min-dalle's, "flax" for all else."""
    return "min-dalle" if "layer_count" in original.get("config", original) else "flax"


# The processors


def image_processor_for(config: AnyConfig, settings: Mapping[str, Any]) -> HfvlmDALLEMiniImageProcessor:
    codec = config.codec_config if isinstance(config, HfvlmDALLEMiniConfig) else config
    size = {} if codec is None else {"size": codec.image_size}
    return HfvlmDALLEMiniImageProcessor(**size | settings.get("image_processor", {}))


def processor_for(config: Any, settings: Mapping[str, Any], vocabulary: Path) -> HfvlmDALLEMiniProcessor:
    """Return the processor; `vocabulary` is the tokenizer's original file, beside which the words of hashtags may be.

    Raises:
        ValueError: the vocabulary has more pieces than the model's table has rows.
    """
    words = vocabulary.parent / HfvlmDALLEMiniTokenizer.vocab_files_names["hashtag_file"]
    options = {"model_max_length": config.text_config.max_position_embeddings, **settings.get("tokenizer", {})}
    options |= {"hashtag_file": words} if words.exists() else {}
    tokenizer = HfvlmDALLEMiniTokenizer.from_vocabulary(vocabulary, **options)
    rows = config.text_config.vocab_size
    if len(tokenizer) > rows:  # the last of which may be unused
        check_vocabulary(vocabulary, len(tokenizer), rows, "number of pieces is", "text_config.vocab_size")
    return HfvlmDALLEMiniProcessor(image_processor_for(config, settings), tokenizer)


def vocabularies_for(config: Any) -> list[Names]:
    return [VOCABULARIES] if isinstance(config, HfvlmDALLEMiniConfig) else []


CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=vocabularies_for,
    parts=PARTS,
    files=FILES,
    compose=compose,
    fresh_parameters=fresh_parameters,
)
