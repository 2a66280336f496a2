"""Encoders of MERLOT Reserve, in whose queries and keys positions are.

Source: https://github.com/rowanz/merlot_reserve at d22c50f, mreserve/modeling.py.
"""

from math import log2, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from hfvlm.models.merlot_reserve.configuration_merlot_reserve import ROTARY_SIZE
from hfvlm.modules.transformer import MLP, Attention, MultiHead, PreNormLayer, Stack

HIGHEST_FREQUENCY = 10.0


def centred(length: int, device: torch.device | None = None) -> Tensor:
    """Count positions from the middle, which none has: ... -2, -1, 1, 2 ..."""
    line = torch.arange(length, device=device, dtype=torch.float32) - length // 2
    return torch.where(line < 0, line, line + 1)


def grid_coordinates(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Return each patch's row and column, `(rows * columns, 2)`, in a square around the image."""
    axes = torch.meshgrid(centred(rows, device), centred(columns, device), indexing="ij")
    return torch.stack(axes, dim=-1).flatten(0, 1) / (max(rows, columns) + 1)


def rotary_factors(coordinates: Tensor, width: int) -> Tensor:
    """Compute what channels of queries and keys are multiplied by: coordinates `(B, N, A)` -> `(B, 1, N, width)`.

    The original swaps sine and cosine and does not mix the channels of a pair, on which its weights depend: no pair is
    rotated, its first channel is multiplied by sine - cosine and its second by sine + cosine.
    """
    frequencies = 2.0 ** torch.linspace(
        0.0, log2(HIGHEST_FREQUENCY / 2), ROTARY_SIZE // (2 * coordinates.shape[-1]), device=coordinates.device
    )
    angles = (coordinates.float().unsqueeze(-1) * frequencies * pi).flatten(-2)
    sine, cosine = angles.sin(), angles.cos()
    factors = torch.stack([sine - cosine, sine + cosine], dim=-1).flatten(-2)
    return F.pad(factors, (0, width - ROTARY_SIZE), value=1.0).unsqueeze(1)


class RotaryAttention(MultiHead):
    """Attention whose queries and keys hold positions; only its output has no bias."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, rotary: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, D), mask, (B, 1, N, head_dim) -> (B, N, D) and, where the implementation has them, weights."""
        query, key, value = (self.heads(part(x)) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.mix(query * rotary.to(query.dtype), key * rotary.to(key.dtype), value, mask, **kwargs)


class NarrowingMLP(MLP):
    """An MLP whose second layer has no bias."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class Encoder(nn.Module):
    """Layers between two norms."""

    def __init__(self, config: Any, depth: int):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = Stack(
            PreNormLayer(config, attention=RotaryAttention(config), mlp=NarrowingMLP(config)) for _ in range(depth)
        )
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, coordinates: Tensor, mask: Any = None, **kwargs: Any) -> Tensor:
        """Encode (B, N, D) at coordinates (B or 1, N, A) -> (B, N, D)."""
        rotary = rotary_factors(coordinates, self.head_dim)
        return self.post_norm(self.layers(self.pre_norm(x), mask, rotary=rotary, **kwargs))


class ClassTokenEncoder(Encoder):
    """The same with a class token, at 0 on all axes, and its projection into the joint space."""

    def __init__(self, config: Any, depth: int):
        super().__init__(config, depth)
        self.class_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.class_token, std=std)

    def forward(self, x: Tensor, coordinates: Tensor, mask: Any = None, **kwargs: Any) -> Tensor:
        """Encode (B, N, D) -> (B, 1 + N, D), the class token first; a mask is that of all of these."""
        x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)
        return super().forward(x, F.pad(coordinates, (0, 0, 1, 0)), mask, **kwargs)


class GroupPool(nn.Module):
    """Attention of each group's mean to the group."""

    def __init__(self, config: Any):
        super().__init__()
        self.attention = Attention(config)

    def forward(self, groups: Tensor) -> Tensor:
        """(B, G, K, D) -> (B, G, D)."""
        flat = groups.flatten(0, 1)
        return self.attention(flat.mean(dim=1, keepdim=True), context=flat)[0].view(*groups.shape[:2], -1)
