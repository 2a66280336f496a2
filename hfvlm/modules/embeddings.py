"""Pixels and token ids to vectors."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from hfvlm.configuration import BertTextConfig, TextConfig, VisionConfig


class PatchEmbedding(nn.Module):
    """(B, C, H, W) -> (B, H/p * W/p, D), rows of patches from top to bottom."""

    def __init__(self, config: VisionConfig, *, bias: bool = True):
        super().__init__()
        size = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, size, stride=size, bias=bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class TokenEmbedding(nn.Module):
    """(B, N) -> (B, N, D): token plus learned absolute position."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Parameter(torch.zeros(config.max_position_embeddings, config.hidden_size))

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.position, std=std)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embed token ids `(B, N)`, padded on either side where `attention_mask`, `(B, N)`, is 0."""
        length, longest = input_ids.shape[1], self.position.shape[0]
        if length > longest:
            raise ValueError(
                f"input_ids have {length} tokens, the text tower has positions for {longest} "
                "(max_position_embeddings): truncate the texts, or add positions with `resize_positions`."
            )
        if attention_mask is None:
            return self.token(input_ids) + self.position[:length]
        return self.token(input_ids) + F.embedding(padded_positions(attention_mask), self.position)


class BertEmbedding(nn.Module):
    """(B, N) -> (B, N, D): token plus learned absolute position plus, where there are any, token type; then a norm."""

    def __init__(self, config: BertTextConfig):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position = nn.Parameter(torch.zeros(config.max_position_embeddings, config.hidden_size))
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.position, std=std)

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Token ids `(B, N)`, their positions `(B, N)` or `(1, N)` and types, by default 0."""
        x = self.token(input_ids) + self.position[position_ids]
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        return self.dropout(self.norm(x))


def present(input_ids: Tensor, pad_token_id: int | None, attention_mask: Tensor | None = None) -> Tensor:
    """Return where ids `(B, N)` are no padding, `(B, N)`: by the mask or, without one, by the id of padding; without
    both, everywhere."""
    if attention_mask is not None:
        return attention_mask.bool()
    return torch.ones_like(input_ids, dtype=torch.bool) if pad_token_id is None else input_ids.ne(pad_token_id)


def text_starts(attention_mask: Tensor) -> Tensor:
    """Find the position of each text's first token: `(B, N)` with 0 for padding -> `(B, 1)`."""
    return attention_mask.long().argmax(dim=1, keepdim=True)


def padded_positions(attention_mask: Tensor) -> Tensor:
    """Count positions from each text's first token: `(B, N)` with 0 for padding -> `(B, N)`; padding before it goes on
    counting from the text's end, as if it stood there."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device) - text_starts(attention_mask)
    return torch.where(positions < 0, positions + attention_mask.shape[1], positions)


def right_padded(attention_mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Put padding before a text behind it, in rows `(B, N, ...)`; see `as_padded`."""
    length = attention_mask.shape[1]
    order = torch.arange(length, device=attention_mask.device) + text_starts(attention_mask)
    order = torch.where(order < length, order, order - length)
    return [_ordered(tensor, order) for tensor in tensors]


def as_padded(attention_mask: Tensor, rows: Tensor) -> Tensor:
    """Undo `right_padded`, of its rows or what was computed of them: padding is on the side where it was."""
    return _ordered(rows, padded_positions(attention_mask))


def _ordered(rows: Tensor, order: Tensor) -> Tensor:
    shape = order.shape + (1,) * (rows.ndim - 2)
    return rows.gather(1, order.view(shape).expand(-1, -1, *rows.shape[2:]))


def text_positions(input_ids: Tensor, attention_mask: Tensor | None, longest: int, past: int = 0) -> Tensor:
    """Count positions of ids `(B, N)` that follow `past` others, counted from each text's first token.

    Padding on the left has no positions of its own; on the right it goes on counting.

    Args:
        attention_mask: `(B, past + N)` with 0 for padding, or None for no padding.
        longest: how many positions the text tower has.
    """
    length = past + input_ids.shape[1]
    if length > longest:
        raise ValueError(
            f"input_ids have {length} tokens, the text tower has positions for {longest} (max_position_embeddings): "
            "truncate the texts, or generate fewer tokens."
        )
    positions = torch.arange(past, length, device=input_ids.device).unsqueeze(0)
    if attention_mask is None:
        return positions
    return (positions - attention_mask.argmax(dim=1, keepdim=True)).clamp_min(0)
