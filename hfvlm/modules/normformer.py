"""Layers with what was proposed for the norms, the attention and the MLP of a transformer, in all combinations.

Norms are NormFormer's (https://arxiv.org/abs/2110.09456), CogView's (https://arxiv.org/abs/2105.13290), Sub-LN's
(https://arxiv.org/abs/2210.06423), Swin-V2's (https://arxiv.org/abs/2111.09883) or those before each branch alone;
the residual stream may be scaled as DeepNet's (https://arxiv.org/abs/2203.00555), MLPs be gated
(https://arxiv.org/abs/2002.05202), attention be a cosine, scale its heads, know learned relative positions, or have
weights that are normalised in turns. A configuration says which, in the fields that `HfvlmDALLEMiniTextConfig`
documents.

Source: https://github.com/borisdayma/dalle-mini at f0be4de (src/dalle_mini/model/modeling.py), all of whose variants
that run are here. Dropout is of each number; the original's attention drops the same ones in all rows and heads.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from hfvlm.modules.transformer import Attention, CausalAttention, CrossAttention, MultiHead

# Of the residual stream, where norms are Swin-V2's: after every sixth layer but the last.
STREAM_NORM_EVERY = 6


class SmeLU(nn.Module):
    """A quadratic between the identity and a constant, from 1 to -1 (https://arxiv.org/abs/2202.06499): the constant
    is a quarter in the original, which puts 0 into the quadratic, and not 0."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.where(x <= -1, 0.0, x)
        return torch.where(x >= 1, x, (x + 1).square() / 4)


def norm(config: Any, size: int, *where: str) -> nn.Module:
    """Make a norm, if `config.norms` is one of `where` or nothing is named."""
    if where and config.norms not in where:
        return nn.Identity()
    kind = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return kind(size, eps=config.layer_norm_eps)


class RelativePositions(nn.Module):
    """A learned bias of each head for each pair of a query's and a key's position."""

    def __init__(self, queries: int, keys: int, heads: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(queries, keys, heads))

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.bias, std=std)

    def forward(self, mask: Tensor | None, positions: Tensor, keys: int, *, causal: bool) -> Tensor:
        """Add the bias of queries at `positions` `(N,)` to a mask -> `(B or 1, heads, N, keys)`."""
        bias = self.bias[positions, :keys].permute(2, 0, 1).unsqueeze(0)
        if mask is None and causal:
            mask = positions.unsqueeze(-1) >= torch.arange(keys, device=positions.device)
        if mask is None:
            return bias
        if mask.dtype == torch.bool:
            return torch.where(mask, bias, torch.finfo(bias.dtype).min)
        return mask + bias


class VariantHeads(MultiHead):
    """Heads with what the configuration adds to them."""

    gained = True

    def __init__(self, config: Any, layer_idx: int, queries: int, keys: int):
        MultiHead.__init__(self, config, bias=config.bias)
        self.layer_idx = layer_idx
        heads = config.num_attention_heads
        self.head_scale = nn.Parameter(torch.ones(heads)) if config.head_scale else None
        self.relative = RelativePositions(queries, keys, heads) if config.relative_positions else None
        self.mid_norm = norm(config, config.hidden_size, *(["subln"] if self.gained else ["never"]))

    def init_own_weights(self, std: float) -> None:
        if self.head_scale is not None:
            init.ones_(self.head_scale)
        # Sub-LN's gain leaves cross-attention out, DeepNet's does not.
        gain = self.config.init_gain if self.gained or self.config.residual_scale != 1 else 1.0
        for projection in (self.v_proj, self.out_proj):
            init.normal_(projection.weight, std=std * gain)

    def mix(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Do as `MultiHead.mix`; `positions` `(N,)` are those of the queries."""
        if (temperature := self.config.cosine_temperature) is not None:
            query, key = (x / (x.norm(dim=-1, keepdim=True) + 1e-8) for x in (query, key))
            query = query * (self.head_dim**0.5 / temperature)
        if self.relative is not None and positions is not None:
            # Rows that share a context lie side by side.
            positions = positions.repeat(query.shape[2] // len(positions))
            mask = self.relative(mask, positions, key.shape[2], causal=self.is_causal)
        return self.weigh(query, key, value, mask, **kwargs)

    def weigh(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        return super().mix(query, key, value, mask, **kwargs)

    def join(self, x: Tensor) -> Tensor:
        if self.head_scale is not None:
            x = (x.unflatten(-1, (-1, self.head_dim)) * self.head_scale.unsqueeze(-1)).flatten(-2)
        return super().join(self.mid_norm(x))


class SelfHeads(VariantHeads, Attention):
    """Attention of a sequence to itself."""


class SinkhornHeads(SelfHeads):
    """Attention whose weights are normalised over keys and queries in turns (https://arxiv.org/abs/2110.11773)."""

    def weigh(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        scores = query @ key.mT * self.head_dim**-0.5
        lowest = torch.finfo(scores.dtype).min
        hidden = None if mask is None else ~mask if mask.dtype == torch.bool else mask <= lowest / 2
        if mask is not None:
            scores = scores if mask.dtype == torch.bool else scores + mask
            scores = scores.masked_fill(hidden, lowest)
        for i in range(self.config.sinkhorn_iterations):
            scores = scores - scores.logsumexp(dim=-2 if i % 2 else -1, keepdim=True)
            scores = scores if hidden is None else scores.masked_fill(hidden, lowest)
        weights = nn.functional.dropout(scores.exp(), self.config.attention_dropout, training=self.training)
        return self.join((weights @ value).transpose(1, 2).flatten(2)), weights


class CausalHeads(VariantHeads, CausalAttention):
    """Attention of each token to those before it."""


class ContextHeads(VariantHeads, CrossAttention):
    """Attention of a sequence to its context."""

    gained = False


class VariantMLP(nn.Module):
    """Norm, widen, activate and gate, norm, narrow, norm: as many norms as the configuration says."""

    def __init__(self, config: Any):
        super().__init__()
        size, wide = config.hidden_size, config.intermediate_size
        self.gain = config.init_gain
        self.norm = norm(config, size, "normformer", "cogview", "preln", "subln")
        self.fc1 = nn.Linear(size, wide, bias=config.bias)
        self.gate = nn.Linear(size, wide, bias=config.bias) if config.gated else None
        self.act = SmeLU() if config.activation == "smelu" else ACT2FN[config.activation]
        self.mid_norm = norm(config, wide, "normformer", "subln")
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc2 = nn.Linear(wide, size, bias=config.bias)
        self.out_norm = norm(config, size, "swinv2", "cogview")

    def init_own_weights(self, std: float) -> None:
        for layer in (self.fc1, self.gate, self.fc2):
            if layer is not None:
                init.normal_(layer.weight, std=std * self.gain)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        wide = self.act(self.fc1(x))
        wide = wide if self.gate is None else wide * self.gate(x)
        return self.out_norm(self.fc2(self.dropout(self.mid_norm(wide))))


class VariantLayer(GradientCheckpointingLayer):
    """Attention and MLP, each with its norms, on a residual stream."""

    norms_before: tuple[str, ...] = ("normformer", "cogview", "preln", "subln")

    def __init__(self, config: Any, layer_idx: int, attention: VariantHeads):
        super().__init__()
        size = config.hidden_size
        self.scale = config.residual_scale
        self.attention_norm = norm(config, size, *self.norms_before)
        self.attention = attention
        self.attention_out_norm = norm(config, size, "normformer", "cogview", "swinv2")
        self.mlp = VariantMLP(config)
        normed = (layer_idx + 1) % STREAM_NORM_EVERY == 0 and layer_idx + 1 != config.num_hidden_layers
        self.stream_norm = norm(config, size, "swinv2" if normed else "never")
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, mask: Any = None, **kwargs: Any) -> Tensor:
        """(B, N, D), (B, 1, N, M) or None -> (B, N, D)."""
        attended = self.attention(self.attention_norm(x), mask, **kwargs)[0]
        return self.fed(self.added(x, self.attention_out_norm(attended)))

    def added(self, x: Tensor, branch: Tensor) -> Tensor:
        return self.scale * x + self.dropout(branch)

    def fed(self, x: Tensor) -> Tensor:
        return self.stream_norm(self.added(x, self.mlp(x)))


class VariantContextLayer(VariantLayer):
    """The same, with attention to a context before the MLP."""

    norms_before = ("normformer", "cogview", "preln")

    def __init__(self, config: Any, layer_idx: int):
        codes = config.max_position_embeddings
        super().__init__(config, layer_idx, CausalHeads(config, layer_idx, codes, codes))
        self.context_norm = norm(config, config.hidden_size, *self.norms_before)
        self.cross_attention = ContextHeads(config, layer_idx, codes, config.context_length)
        self.context_out_norm = norm(config, config.hidden_size, "normformer", "cogview", "swinv2")

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        mask: Any,
        context: Tensor,
        context_mask: Any,
        kept: dict[int, tuple[Tensor, Tensor]] | None,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B * T, N, D), its mask, (B, M, D), its mask -> (B * T, N, D)."""
        attended = self.attention(self.attention_norm(x), mask, positions=positions, **kwargs)[0]
        x = self.added(x, self.attention_out_norm(attended))
        read = self.cross_attention(self.context_norm(x), context, context_mask, kept, positions=positions)[0]
        return self.fed(self.added(x, self.context_out_norm(read)))


class VariantEmbedding(nn.Module):
    """(B, N) -> (B, N, D): token plus, where there is one, learned position; then a norm."""

    def __init__(self, config: Any):
        super().__init__()
        size = config.hidden_size
        self.scale = size**0.5 if config.scale_embedding else 1.0
        self.token = nn.Embedding(config.vocab_size, size)
        self.position = (
            nn.Parameter(torch.zeros(config.max_position_embeddings, size)) if config.absolute_positions else None
        )
        self.norm = norm(config, size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def init_own_weights(self, std: float) -> None:
        if self.position is not None:
            init.normal_(self.position, std=std)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.token(input_ids) * self.scale
        x = x if self.position is None else x + self.position[position_ids]
        return self.dropout(self.norm(x))
