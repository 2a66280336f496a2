"""Sequences to one vector."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hfvlm.configuration import TowerConfig
from hfvlm.modules.embeddings import text_starts
from hfvlm.modules.transformer import MLP, Attention

# Larger than every token id; OpenVINO's 32 bits hold it, and fail at their largest number.
ABOVE_IDS = 2**30


class AttentionPool(nn.Module):
    """One learned query attends to the sequence, then a residual MLP: the MAP head of big_vision. Without `heads` and
    an `intermediate_size` of its own, it has its tower's."""

    def __init__(self, config: TowerConfig, heads: int | None = None, intermediate_size: int | None = None):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attention = Attention(config, heads=heads)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config, intermediate_size)

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.probe, std=std)

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, N, D), (B, 1, 1, N) or None -> (B, D)."""
        pooled, _ = self.attention(self.probe.expand(x.shape[0], -1, -1), mask, context=x, **kwargs)
        return (pooled + self.mlp(self.mlp_norm(pooled))).squeeze(1)


class FirstToken(nn.Module):
    """The class token."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """(B, N, D) -> (B, D)."""
        return x[:, 0]


def first_token(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Take each text's first token, `(B, N, D)`, or `(B, 1, D)` of it alone -> `(B, D)`; `attention_mask`, `(B, N)`,
    is 0 for padding."""
    if attention_mask is None or x.shape[1] == 1:
        return x[:, 0]
    return x.gather(1, text_starts(attention_mask).unsqueeze(-1).expand(-1, -1, x.shape[-1])).squeeze(1)


def last_position(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Take the token at the last position, `(B, N, D)`, or `(B, 1, D)` of it alone -> `(B, D)`; with padding before a
    text, that before it."""
    if attention_mask is None or x.shape[1] == 1:
        return x[:, -1]
    starts = text_starts(attention_mask)
    last = torch.where(starts > 0, starts, x.shape[1]) - 1
    return x.gather(1, last.unsqueeze(-1).expand(-1, -1, x.shape[-1])).squeeze(1)


def tokens_at(x: Tensor, positions: Tensor) -> Tensor:
    """Take one token of each row: `(B, N, D)`, `(B,)` -> `(B, D)`."""
    return x[torch.arange(x.shape[0], device=x.device), positions]


def end_of_text(input_ids: Tensor, eos_token_id: int | None, attention_mask: Tensor | None = None) -> Tensor:
    """Find where CLIP pools, `(B, N)` -> `(B,)`: the first end-of-text token, or the first largest id in a row without
    one. Padding, where `attention_mask` is 0, is no such token.

    In the original vocabulary end-of-text is the largest id and the original's rule is the argmax alone; tokens that
    a user adds have larger ids and must not attract the pooling.
    """
    if eos_token_id is not None:
        input_ids = input_ids.masked_fill(input_ids == eos_token_id, ABOVE_IDS)
    if attention_mask is not None:
        input_ids = input_ids.masked_fill(attention_mask == 0, -1)
    return input_ids.argmax(dim=-1)


def first_of(input_ids: Tensor, token_id: int | None, attention_mask: Tensor | None = None) -> Tensor:
    """Find the first token of an id in each text, `(B, N)` -> `(B,)`: the text's first token where there is none.
    Padding, where `attention_mask` is 0, is no such token."""
    found = torch.zeros_like(input_ids, dtype=torch.bool) if token_id is None else input_ids.eq(token_id)
    if attention_mask is None:
        return found.int().argmax(dim=-1)
    found = found & attention_mask.bool()
    return torch.where(found.any(dim=-1), found.int().argmax(dim=-1), text_starts(attention_mask).squeeze(1))


def own_pooled(output: Any, mask: Tensor | None) -> Tensor:
    """Take the pooled output that a model of transformers has itself, `(B, D)`.

    Raises:
        ValueError: it has none.
    """
    if output.get("pooler_output") is None:
        raise ValueError('The trunk has no pooled output of its own: set pooling to "mean" or "first".')
    return output.pooler_output.flatten(1)


def first_output(output: Any, mask: Tensor | None) -> Tensor:
    """Take the first token of a model's output; see `first_token`."""
    return first_token(output.last_hidden_state, mask)


def mean_output(output: Any, mask: Tensor | None) -> Tensor:
    """Average a model's tokens `(B, N, D)` where `mask`, `(B, N)`, is not 0, or its map `(B, D, H, W)` -> `(B, D)`."""
    x = output.last_hidden_state
    x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
    if mask is None:
        return x.mean(dim=1)
    weights = mask.unsqueeze(-1).to(x.dtype)
    return (x * weights).sum(dim=1) / weights.sum(dim=1)


def largest_output(output: Any, mask: Tensor | None) -> Tensor:
    """Take the largest value of each channel of a model's tokens `(B, N, D)` where `mask`, `(B, N)`, is not 0."""
    x = output.last_hidden_state
    x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
    return (x if mask is None else x.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf)).amax(dim=1)


# How the output of a model of transformers is pooled, by the name that a configuration has for it.
POOLINGS: Mapping[str, Callable[[Any, Tensor | None], Tensor]] = {
    "pooler": own_pooled,
    "first": first_output,
    "mean": mean_output,
    "max": largest_output,
}
