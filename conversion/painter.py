"""Painter's released file: {"model": state_dict}.

Source: https://github.com/baaivision/Painter at cfec845 (models_painter.py).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion, always
from hfvlm.checkpoints.key_table import Change, Row, split, unbatched
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options, count_layers
from hfvlm.models.painter.configuration_painter import HfvlmPainterConfig
from hfvlm.models.painter.processing_painter import HfvlmPainterImageProcessor, HfvlmPainterProcessor

# One token, of a batch of one grid of one row.
token = Change(lambda tensor: tensor.flatten(), lambda tensor: tensor.reshape(1, 1, 1, -1))
LOSSES = {"smoothl1": "smooth_l1", "l1": "l1", "l2": "l2", "l1l2": "l1l2"}
OPTIONS = (
    *("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias"),
    *("drop_path_rate", "use_abs_pos", "use_rel_pos", "rel_pos_zero_init", "window_size", "window_block_indexes"),
    *("residual_block_indexes", "use_act_checkpoint", "pretrain_img_size", "pretrain_use_cls_token", "out_feature"),
    *("decoder_embed_dim", "loss_func"),
)
NAMES = {"norm1": "attention_norm", "norm2": "mlp_norm", "attn.proj": "attention.out_proj"}


def keys_for(config: HfvlmPainterConfig, layout: str = "painter", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for a file of `layout`, which is "painter"."""
    block, layer = "blocks.{}", "layers.{}"
    qkv = tuple(f"{layer}.attention.{part}_proj.{{}}" for part in "qkv")
    tokens = {"mask_token": "mask_token", "segment_token_x": "image_token", "segment_token_y": "target_token"}
    decoder = {"decoder_embed": "projection", "decoder_pred.0": "conv", "decoder_pred.1": "norm"}
    rows = [
        *(Row(theirs, ours, token) for theirs, ours in tokens.items()),
        Row("pos_embed", "position", unbatched),
        Row("patch_embed.proj.{}", "patches.projection.{}"),
        *(Row(f"{block}.{theirs}.{{}}", f"{layer}.{ours}.{{}}") for theirs, ours in NAMES.items()),
        Row(f"{block}.attn.qkv.{{}}", qkv, split(3)),
        Row(f"{block}.mlp.{{}}.{{}}", f"{layer}.mlp.{{}}.{{}}"),
        Row("norm.{}", "norm.{}"),
        *(Row(f"{theirs}.{{}}", f"decoder.{ours}.{{}}") for theirs, ours in decoder.items()),
        Row("decoder_pred.3.{}", "decoder.head.{}"),
    ]
    if config.use_relative_positions:
        rows += [
            Row(f"{block}.attn.rel_pos_h", f"{layer}.attention.row_position"),
            Row(f"{block}.attn.rel_pos_w", f"{layer}.attention.column_position"),
        ]
    if config.residual_indices:
        rows += [Row(f"{block}.residual.{{}}.{{}}", f"{layer}.residual.{{}}.{{}}")]
    return rows


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmPainterConfig:
    """Read the constructor's arguments, under "config" or by themselves; what they leave out, shapes say, or it is as
    in the release."""
    options = original.get("config", {name: original[name] for name in OPTIONS if name in original})
    check_options("Painter's constructor", options, OPTIONS)
    for name in ("use_abs_pos", "pretrain_use_cls_token"):
        if not options.get(name, True):
            raise UnsupportedOriginalError(f"Painter's constructor: hfvlm does not implement {name}=False.")
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    width, patch = shapes["patch_embed.proj.weight"][0], shapes["patch_embed.proj.weight"][2]
    depth, relative = count_layers(shapes, "blocks."), "blocks.0.attn.rel_pos_h" in shapes
    windows = window_indices(options, shapes, depth)
    residual = [index for index in range(depth) if f"blocks.{index}.residual.conv1.weight" in shapes]
    squares = [shapes[f"blocks.{index}.attn.rel_pos_h"][0] // 2 + 1 for index in windows if relative]
    heads = options.get("num_heads") or (width // shapes["blocks.0.attn.rel_pos_h"][1] if relative else width // 64)
    return HfvlmPainterConfig(
        hidden_size=width,
        intermediate_size=shapes["blocks.0.mlp.fc1.weight"][0],
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=image_size(options, shapes, windows, patch),
        patch_size=patch,
        pretrain_image_size=math.isqrt(shapes["pos_embed"][1] - 1) * patch,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        use_relative_positions=relative,
        window_size=squares[0] if squares else options.get("window_size") or 14,
        window_indices=windows,
        residual_indices=residual,
        decoder_hidden_size=shapes["decoder_pred.1.weight"][0],
        drop_path_rate=options.get("drop_path_rate", 0.1),
        pixel_loss=pixel_loss(options.get("loss_func", "smoothl1")),
    )


def window_indices(options: Mapping[str, Any], shapes: Mapping[str, Any], depth: int) -> list[int]:
    """Return the layers that attend within windows: those named by the constructor, whose lists of indices name none
    (the release's factory passes such), or those whose tables of positions are for squares."""
    named = options.get("window_block_indexes")
    if named is not None:
        return sorted(i for i in set(filter(is_index, named)) if i < depth) if options.get("window_size") else []
    tables = [[shapes.get(f"blocks.{i}.attn.rel_pos_{axis}", (axis,))[0] for axis in "hw"] for i in range(depth)]
    return [index for index, (rows, columns) in enumerate(tables) if rows == columns]


def is_index(value: Any) -> bool:
    return isinstance(value, int)


def image_size(
    options: Mapping[str, Any], shapes: Mapping[str, Any], windows: Iterable[int], patch: int
) -> tuple[int, int]:
    """Return height and width of both images: the constructor's, or what a layer that attends to all of them says."""
    if size := options.get("img_size"):
        height, width = size
        return height, width
    tables = [f"blocks.{i}.attn.rel_pos_{{}}" for i in range(count_layers(shapes, "blocks.")) if i not in set(windows)]
    found = [name for name in tables if name.format("h") in shapes]
    if not found:
        return HfvlmPainterConfig().image_size[0], HfvlmPainterConfig().image_size[1]
    rows, columns = (shapes[found[0].format(axis)][0] // 2 + 1 for axis in "hw")
    return rows * patch, columns * patch


def pixel_loss(name: str) -> str:
    """Translate the name of a loss.

    Raises:
        UnsupportedOriginalError: the original has none of that name.
    """
    if name not in LOSSES:
        raise UnsupportedOriginalError(f"Painter's loss_func {name!r} is none of {', '.join(LOSSES)}.")
    return LOSSES[name]


layout_of = always("painter")


def image_processor_for(config: HfvlmPainterConfig, settings: Mapping[str, Any]) -> HfvlmPainterImageProcessor:
    """Return the image processor, of images as large as the model's are."""
    height, width = config.image_size
    size = {"height": height // 2, "width": width}
    return HfvlmPainterImageProcessor(**{"size": size} | settings.get("image_processor", {}))


def processor_for(config: HfvlmPainterConfig, settings: Mapping[str, Any], *_: Any) -> HfvlmPainterProcessor:
    """Return the processor, which has no vocabulary."""
    return HfvlmPainterProcessor(image_processor_for(config, settings))


CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([]),
)
