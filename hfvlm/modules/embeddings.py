"""Pixels and token ids to vectors."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hfvlm.configuration import TextConfig, VisionConfig


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

    def forward(self, input_ids: Tensor) -> Tensor:
        length, longest = input_ids.shape[1], len(self.position)
        if length > longest:
            raise ValueError(
                f"input_ids have {length} tokens, the text tower has positions for {longest} "
                "(max_position_embeddings): truncate the texts, or add positions with `resize_positions`."
            )
        return self.token(input_ids) + self.position[:length]
