"""VQGAN's files: of taming-transformers, of their translation to Flax, and of min-dalle, which is a decoder alone.

Source: https://github.com/CompVis/taming-transformers at 3ba01b2, https://github.com/patil-suraj/vqgan-jax at 10ef240,
https://github.com/kuprel/min-dalle at 73621fb.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from hfvlm.checkpoints.key_table import Change, Row, permute
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options, count_layers
from hfvlm.models.dalle_mini.configuration_dalle_mini import HfvlmDALLEMiniVQGANConfig

VQGAN_OPTIONS = (
    *("ch", "out_ch", "in_channels", "num_res_blocks", "resolution", "z_channels", "ch_mult", "attn_resolutions"),
    *(
        "n_embed",
        "embed_dim",
        "resamp_with_conv",
        "model_type",
        "architectures",
        "transformers_version",
        "torch_dtype",
    ),
)

kernel = permute(3, 2, 0, 1)
# Convolutions of one pixel that are linear layers here, in Flax and in PyTorch.
flax_pixel = Change(lambda tensor: tensor[0, 0].t(), lambda tensor: tensor.t()[None, None])
torch_pixel = Change(lambda tensor: tensor[:, :, 0, 0], lambda tensor: tensor[:, :, None, None])


def vqgan_rows(config: HfvlmDALLEMiniVQGANConfig, keys: Collection[str], prefix: str = "") -> list[Row]:
    """Return the rows of a VQGAN, of Flax's file, of taming-transformers' or, its decoder alone, of min-dalle's."""
    flax, bare = any("/" in key for key in keys), "embedding.weight" in keys
    modules = [("post_quant_conv", "from_codes", "conv"), *half_modules("decoder", "up", config)]
    if config.has_encoder:
        modules += [("quant_conv", "to_codes", "conv"), *half_modules("encoder", "down", config)]
    table = "quantize/embedding/embedding" if flax else f"{'' if bare else 'quantize.'}embedding.weight"
    rows = [Row(table, f"{prefix}codes.weight")]
    if not flax:  # perceptual loss and discriminator
        rows.append(Row("loss.{...}", None, optional=True))
    for theirs, ours, kind in modules:
        if flax:
            source = re.sub(r"/(\d+)", r"_\1", theirs)
            name, change = ("scale", None) if kind == "norm" else ("kernel", kernel if kind == "conv" else flax_pixel)
            pairs = ((f"{source}/{name}", "weight", change), (f"{source}/bias", "bias", None))
        else:
            source = theirs.replace("/", ".")
            pairs = (
                (f"{source}.weight", "weight", torch_pixel if kind == "pixel" else None),
                (f"{source}.bias", "bias", None),
            )
        rows += [Row(key, f"{prefix}{ours}.{name}", change) for key, name, change in pairs]
    return rows


def half_modules(half: str, level: str, config: HfvlmDALLEMiniVQGANConfig) -> Iterator[tuple[str, str, str]]:
    """Yield each module of a half of a VQGAN: its path there and here, and its kind."""
    last, down = len(config.channel_ratios) - 1, level == "down"
    ratios = (1, *config.channel_ratios) if down else (*config.channel_ratios, config.channel_ratios[-1])
    yield f"{half}/conv_in", f"{half}.stem", "conv"
    yield f"{half}/norm_out", f"{half}.norm", "norm"
    yield f"{half}/conv_out", f"{half}.head", "conv"
    yield from block_modules(f"{half}/mid/block_1", f"{half}.middle.block1")
    yield from block_modules(f"{half}/mid/block_2", f"{half}.middle.block2")
    yield from mixing_modules(f"{half}/mid/attn_1", f"{half}.middle.mixing")
    for i in range(last + 1):
        there, here = f"{half}/{level}/{i}", f"{half}.levels.{i}"
        changes = ratios[i] != ratios[i + 1]
        for j in range(config.blocks_per_level + (not down)):
            yield from block_modules(f"{there}/block/{j}", f"{here}.blocks.{j}", shortcut=changes and not j)
            if i in config.attention_levels:
                yield from mixing_modules(f"{there}/attn/{j}", f"{here}.mixing.{j}")
        if config.resample_with_conv and i != (last if down else 0):
            yield f"{there}/{level}sample/conv", f"{here}.resample.conv", "conv"


def block_modules(there: str, here: str, *, shortcut: bool = False) -> Iterator[tuple[str, str, str]]:
    for i in (1, 2):
        yield f"{there}/norm{i}", f"{here}.norm{i}", "norm"
        yield f"{there}/conv{i}", f"{here}.conv{i}", "conv"
    if shortcut:
        yield f"{there}/nin_shortcut", f"{here}.shortcut", "conv"


def mixing_modules(there: str, here: str) -> Iterator[tuple[str, str, str]]:
    yield f"{there}/norm", f"{here}.norm", "norm"
    for theirs, ours in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("proj_out", "out_proj")):
        yield f"{there}/{theirs}", f"{here}.attention.{ours}", "pixel"


def vqgan_defaults(original: Mapping[str, Any]) -> HfvlmDALLEMiniVQGANConfig:
    """Return a VQGAN's configuration from the original's alone."""
    check_vqgan(original)
    ratios = tuple(original.get("ch_mult", (1, 1, 2, 2, 4)))
    size = original.get("resolution", 256)
    return HfvlmDALLEMiniVQGANConfig(
        hidden_size=original.get("ch", 128),
        channel_ratios=ratios,
        blocks_per_level=original.get("num_res_blocks", 2),
        attention_levels=[
            i for i in range(len(ratios)) if size // 2**i in tuple(original.get("attn_resolutions", (16,)))
        ],
        latent_channels=original.get("z_channels", 256),
        code_size=original.get("embed_dim", 256),
        num_codes=original.get("n_embed", 16384),
        image_size=size,
        num_channels=original.get("in_channels", 3),
        resample_with_conv=original.get("resamp_with_conv", True),
    )


def check_vqgan(original: Mapping[str, Any]) -> None:
    check_options("VQGAN's configuration", original, VQGAN_OPTIONS)
    if original.get("out_ch", 3) != original.get("in_channels", 3):
        raise UnsupportedOriginalError("VQGAN's configuration: hfvlm's has as many channels out as in.")


def vqgan_config(original: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> HfvlmDALLEMiniVQGANConfig:
    check_vqgan({} if "embedding.weight" in shapes else original)
    flax = "post_quant_conv/kernel" in shapes
    named = {
        re.sub(r"_(\d+)(?=/)", r"/\1", key) if flax else key.replace(".", "/"): shape for key, shape in shapes.items()
    }

    def sides(module: str) -> tuple[int, int]:
        """Return the channels out and in of a convolution."""
        shape = named[f"{module}/kernel" if flax else f"{module}/weight"]
        return (shape[3], shape[2]) if flax else (shape[0], shape[1])

    levels = count_layers((key.replace("/", ".") for key in named), "decoder.up.")
    widths = [sides(f"decoder/up/{i}/block/0/conv1")[0] for i in range(levels)]
    encoded = any(key.startswith("encoder/") for key in named)
    first = sides("encoder/conv_in")[0] if encoded else widths[0]
    table = next(shape for key, shape in named.items() if key.endswith(("embedding/embedding", "embedding/weight")))
    return HfvlmDALLEMiniVQGANConfig(
        num_channels=sides("decoder/conv_out")[0],
        hidden_size=first,
        channel_ratios=[width // first for width in widths],
        blocks_per_level=count_layers((key.replace("/", ".") for key in named), "decoder.up.0.block.") - 1,
        attention_levels=[i for i in range(levels) if f"decoder/up/{i}/attn/0/norm/bias" in named],
        latent_channels=sides("decoder/conv_in")[1],
        code_size=table[1],
        num_codes=table[0],
        image_size=original.get("resolution", 256),
        resample_with_conv=levels < 2 or "decoder/up/1/upsample/conv/bias" in named,
        group_norm_eps=1e-5 if "embedding.weight" in shapes else 1e-6,
        has_encoder=encoded,
    )
