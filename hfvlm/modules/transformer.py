"""The parts every transformer tower is made of: attention, MLP, a residual wiring, a stack of layers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The definition of attention that every other implementation is checked against; also returns the weights."""
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Multi-head attention of `x` over itself, or over `context` (of width `context_size`) when one is given."""

    is_causal = False

    def __init__(self, config: PreTrainedConfig, context_size: int | None = None, out_size: int | None = None):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(context_size or width, width)
        self.v_proj = nn.Linear(context_size or width, width)
        self.out_proj = nn.Linear(width, out_size or width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, D), (B, 1, N, M) or None, (B, M, C) -> (B, N, D) and, where the implementation has them, weights."""
        source = x if context is None else context
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(self, query, key, value, mask, scaling=self.head_dim**-0.5, dropout=dropout, **kwargs)
        return self.out_proj(out.flatten(2)), weights


class MLP(nn.Module):
    """Widen, activate, narrow."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PreNormLayer(GradientCheckpointingLayer):
    """x + f(norm(x)), for attention and MLP: ViT, CLIP, SigLIP."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask, **kwargs)[0]
        return x + self.mlp(self.mlp_norm(x))


class Stack(nn.ModuleList):
    """Layers applied one after the other; a list, so `Stack(PreNormLayer(config) for _ in range(n))`."""

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        for layer in self:
            x = layer(x, mask, **kwargs)
        return x
