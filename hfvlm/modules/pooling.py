"""Sequences to one vector."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hfvlm.configuration import TowerConfig
from hfvlm.modules.embeddings import text_starts
from hfvlm.modules.transformer import MLP, Attention


class AttentionPool(nn.Module):
    """One learned query attends to the sequence, then a residual MLP: the MAP head of big_vision."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.probe, std=std)

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, N, D), (B, 1, 1, N) or None -> (B, D)."""
        pooled, _ = self.attention(self.probe.expand(x.shape[0], -1, -1), mask, context=x, **kwargs)
        return (pooled + self.mlp(self.mlp_norm(pooled))).squeeze(1)


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
    last = (text_starts(attention_mask) - 1) % x.shape[1]
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
        input_ids = input_ids.masked_fill(input_ids == eos_token_id, torch.iinfo(input_ids.dtype).max)
    if attention_mask is not None:
        input_ids = input_ids.masked_fill(attention_mask == 0, -1)
    return input_ids.argmax(dim=-1)
