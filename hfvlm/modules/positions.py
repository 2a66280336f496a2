"""Learned position tables at other sizes. Which rule a checkpoint needs is a fact of its original code."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

# open_clip and timm
BICUBIC = {"mode": "bicubic", "antialias": True}
# BLIP, Qwen-VL
BICUBIC_SAMPLED = {"mode": "bicubic", "align_corners": False}
# big_vision: scipy.ndimage.zoom, order 1
ALIGNED_CORNERS = {"mode": "bilinear", "align_corners": True}


def check_positions(
    tokens: Tensor, position: Tensor, pixel_values: Tensor, image_size: Any, name: str = "pixel_values"
) -> None:
    """Raise a ValueError about the size of images, called `name`, unless each token of (B, N, D) has a position."""
    if tokens.shape[1] != position.shape[0]:
        raise ValueError(
            f"{name} are {tuple(pixel_values.shape[-2:])}, the vision tower takes image_size {image_size}: "
            "resize the images, or pass interpolate_pos_encoding=True."
        )


def resize_grid(table: Tensor, old: tuple[int, int], new: tuple[int, int], **rule: Any) -> Tensor:
    """Resize (extra + rows * columns, D) to the `new` rows and columns; extra leading rows stay.

    `rule` is one of this module's constants, passed to `torch.nn.functional.interpolate`.
    """
    extra = table.shape[0] - old[0] * old[1]
    image = table[extra:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    resized = interpolate(image, size=new, **rule).flatten(2)[0].t()
    return torch.cat([table[:extra], resized.to(table.dtype)])


def sine_grid(edge: int, size: int) -> Tensor:
    """Make sines and cosines of the column, then of the row, (edge * edge, size), by the Transformer's frequencies."""
    frequencies = 10000 ** (-torch.arange(size // 4).float() / (size // 4))
    waves = torch.outer(torch.arange(edge).float(), frequencies)
    line = torch.cat([waves.sin(), waves.cos()], dim=1)
    return torch.cat([line.repeat(edge, 1), line.repeat_interleave(edge, dim=0)], dim=1)


def resize_line(table: Tensor, length: int) -> Tensor:
    """Resize (N, D) to (length, D), linear: open_clip's text towers."""
    resized = interpolate(table.float().t()[None], size=length, mode="linear", align_corners=False)
    return resized[0].t().to(table.dtype)


def sampled_grid(table: Tensor, y: Tensor, x: Tensor, shapes: Tensor) -> Tensor:
    """Sample the positions of patches of images that all have grids of their own.

    The square `table` (S, S, D) is resized to each image's grid `shapes` (B, 2) as rows and columns, bilinear with
    antialiasing, and sampled at `y`, `x` (B, N): (B, N, D). Resizing is linear, so it is one product with the weights
    that a resize would use, without a loop over images.
    """
    rows = _triangle_weights(y, shapes[:, :1], table.shape[0])
    columns = _triangle_weights(x, shapes[:, 1:], table.shape[1])
    weights = (rows.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(2)
    return (weights @ table.float().flatten(0, 1)).to(table.dtype)


def _triangle_weights(index: Tensor, size: Tensor, source: int) -> Tensor:
    """Weigh each source cell: (B, N) target indices on axes of `size` (B, 1) -> (B, N, source)."""
    scale = source / size.float()
    centre = (index.float() + 0.5) * scale
    cells = torch.arange(source, device=index.device) + 0.5
    reach = scale.clamp_min(1.0).unsqueeze(-1)
    weights = (1 - (cells - centre.unsqueeze(-1)).abs() / reach).clamp_min(0)
    return weights / weights.sum(-1, keepdim=True)
