"""The parts every transformer tower is made of: attention, MLP, a residual wiring, a stack of layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hfvlm.modules.dropout import DropPath
from hfvlm.modules.prefixes import PrefixTree


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
    """Compute attention by its definition, for other implementations to be checked against, and the weights."""
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MultiHead(nn.Module):
    """The projections and the arithmetic that every kind of attention shares; the kinds differ in their keys and
    values. Without a `width` and `heads` of its own, one has its tower's; inputs and outputs have the same width,
    unless `in_size` and `out_size` are another."""

    is_causal = False

    def __init__(
        self,
        config: PreTrainedConfig,
        context_size: int | None = None,
        out_size: int | None = None,
        width: int | None = None,
        heads: int | None = None,
        in_size: int | None = None,
        *,
        bias: bool = True,
    ):
        super().__init__()
        self.config = config
        width = width or config.hidden_size
        self.head_dim = width // (heads or config.num_attention_heads)
        self.q_proj = nn.Linear(in_size or width, width, bias=bias)
        self.k_proj = nn.Linear(context_size or width, width, bias=bias)
        self.v_proj = nn.Linear(context_size or width, width, bias=bias)
        self.out_proj = nn.Linear(width, out_size or width, bias=bias)

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def read(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, C) -> its keys and values, (B, heads, M, head_dim) each."""
        return self.heads(self.k_proj(source)), self.heads(self.v_proj(source))

    def attend(
        self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) over keys and values -> (B, N, D) and, where the implementation has them, weights."""
        return self.mix(self.heads(self.q_proj(x)), key, value, mask, **kwargs)

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        tree: PrefixTree | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Do as `attend`, with queries (B, heads, N, head_dim). With a `tree`, queries, keys and values are of its
        nodes, and the mask is of its texts."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if tree is not None:
            attend = partial(tree.attend, attend)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(self, query, key, value, mask, scaling=self.head_dim**-0.5, dropout=dropout, **kwargs)
        return self.join(out.flatten(2)), weights

    def join(self, x: Tensor) -> Tensor:
        """Turn the heads' outputs, side by side, into the output: (B, N, D) -> (B, N, D)."""
        return self.out_proj(x)


class Attention(MultiHead):
    """Multi-head attention of `x` over itself, or over `context` (of width `context_size`) when one is given."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, D), (B, 1, N, M) or None, (B, M, C) -> (B, N, D) and, where the implementation has them, weights."""
        return self.attend(x, *self.read(x if context is None else context), mask, **kwargs)


class CausalAttention(MultiHead):
    """Attention of each token to itself and to those before it, which a cache of transformers' kind may hold."""

    is_causal = True

    def __init__(self, config: PreTrainedConfig, layer_idx: int, heads: int | None = None):
        super().__init__(config, heads=heads)
        self.layer_idx = layer_idx

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        context: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, D), (B, 1, N, past + N) or None -> (B, N, D) and, where the implementation has them, weights;
        `context` are all tokens where `x` are some."""
        key, value = self.read(x if context is None else context)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        return self.attend(x, key, value, mask, **kwargs)


class CrossAttention(MultiHead):
    """Attention over a context, which several rows may share: the texts of one image, the beams of one caption.

    `x` has `T` consecutive rows for each row of the context. They are laid side by side as the queries of one row, so
    that the context's keys and values are computed once and never copied.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int, context_size: int | None = None, **sizes: Any):
        super().__init__(config, context_size, **sizes)
        self.layer_idx = layer_idx

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        kept: dict[int, tuple[Tensor, Tensor]] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B * T, N, D), (B, M, C), (B, 1, T * N, M) or None -> (B * T, N, D) and, as above, weights.

        With `kept`, the keys and values are taken from there, or put there for the next call.
        """
        texts, rows = x.shape[0], context.shape[0]
        if texts % rows:
            raise ValueError(f"{texts} texts cannot be shared out evenly among the {rows} rows of a context.")
        if kept is None:
            key, value = self.read(context)
        else:
            if self.layer_idx not in kept:
                kept[self.layer_idx] = self.read(context)
            key, value = kept[self.layer_idx]
        out, weights = self.attend(x.reshape(rows, -1, x.shape[-1]), key, value, mask, **kwargs)
        if weights is not None:
            weights = weights.unflatten(2, (-1, x.shape[1])).transpose(1, 2).flatten(0, 1)
        return out.reshape(texts, x.shape[1], -1), weights


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), of which only 1.702 x is stored for the gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(1.702 * x, inplace=not torch.is_grad_enabled()).mul_(1 / 1.702)


class MLP(nn.Module):
    """Widen, activate, narrow. Without an `intermediate_size` of its own, one has its tower's."""

    def __init__(self, config: PreTrainedConfig, intermediate_size: int | None = None):
        super().__init__()
        wide = intermediate_size or config.intermediate_size
        self.fc1 = nn.Linear(config.hidden_size, wide)
        self.act = QuickGELU() if config.hidden_act == "quick_gelu" else ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(wide, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PreNormLayer(GradientCheckpointingLayer):
    """x + f(norm(x)), for attention and MLP: ViT, CLIP, SigLIP. In training, f is left out at a rate `drop_path`.
    Its `attention` and its `mlp` may be of another kind than the plain ones."""

    def __init__(
        self,
        config: PreTrainedConfig,
        drop_path: float = 0.0,
        attention: MultiHead | None = None,
        mlp: nn.Module | None = None,
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = attention or Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp: Any = mlp or MLP(config)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, N, D), (B, 1, N, M) or None, (B, M, D) -> (B, N, D); `context` are all tokens where `x` are some."""
        x = x + self.drop_path(self.attend(x, mask, context, **kwargs))
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))

    def attend(self, x: Tensor, mask: Tensor | None, context: Tensor | None, **kwargs: Any) -> Tensor:
        """Attend to the tokens, or to `context`: as `forward`, without the residual."""
        if context is not None:
            kwargs["context"] = self.attention_norm(context)
        return self.attention(self.attention_norm(x), mask, **kwargs)[0]


class GroundingLayer(GradientCheckpointingLayer):
    """x + f(norm(x)), for attention to a context, which has its own norm, and MLP: open_clip's CoCa and MaMMUT."""

    def __init__(self, config: PreTrainedConfig, attention: CrossAttention):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.context_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        kept: dict[int, tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """As `CrossAttention`: (B * T, N, D), (B, M, D), (B, 1, T * N, M) or None -> (B * T, N, D)."""
        if kept is None or self.attention.layer_idx not in kept:
            context = self.context_norm(context)
        x = x + self.attention(self.attention_norm(x), context, mask, kept)[0]
        return x + self.mlp(self.mlp_norm(x))


class PostNormLayer(GradientCheckpointingLayer):
    """norm(x + f(x)), for attention and MLP: BERT. Its `attention` may be of another kind than the plain one."""

    def __init__(self, config: PreTrainedConfig, attention: MultiHead | None = None):
        super().__init__()
        self.attention = attention or Attention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, N, D), (B, 1, N, M) or None, (B, M, D) -> (B, N, D); `context` are all tokens where `x` are some."""
        if context is not None:
            kwargs["context"] = context
        x = self.attention_norm(x + self.dropout(self.attention(x, mask, **kwargs)[0]))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Stack(nn.ModuleList):
    """Layers applied one after the other; a list, so `Stack(PreNormLayer(config) for _ in range(n))`."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        pooled_only: bool = False,
        pool: Callable[[Tensor], Tensor] | None = None,
        pooled_mask: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Apply all layers: `(B, N, D)` -> `(B, N, D)`.

        With `pooled_only`, the last of them computes one token of each row, `(B, 1, D)`: that which `pool` takes from
        `(B, N, D)`, by default the first. `pooled_mask` is the mask of its attention to all tokens.
        """
        if not pooled_only:
            return self.until(x, -1, mask, **kwargs)
        x = self.until(x, -2, mask, **kwargs)
        pooled = x[:, :1] if pool is None else pool(x).unsqueeze(1)
        return self[-1](pooled, pooled_mask, x, **kwargs | {"is_causal": False})

    def until(self, x: Tensor, index: int, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Apply the layers that make `hidden_states[index]`: `(B, N, D)` -> `(B, N, D)`."""
        for layer in list(self)[: self.depth_of(index)]:
            x = layer(x, mask, **kwargs)
        return x

    def rest(self, x: Tensor, index: int, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Apply the layers after `hidden_states[index]` to it: `(B, N, D)` -> `(B, N, D)`."""
        for layer in list(self)[self.depth_of(index) :]:
            x = layer(x, mask, **kwargs)
        return x

    def depth_of(self, index: int) -> int:
        """How many layers make `hidden_states[index]`, whose first entry is the input of the first layer.

        Raises:
            IndexError: there are fewer layers.
        """
        return range(len(self) + 1)[index]
