"""Hidden states to scores over a vocabulary."""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hfvlm.configuration import BertTextConfig


def last_tokens(x: Tensor, keep: int | Tensor) -> Tensor:
    """Take the last n tokens of `(B, N, D)`, or those at these positions; 0 takes all."""
    return x[:, -keep:] if isinstance(keep, int) else x[:, keep]


class BertLanguageHead(nn.Module):
    """BERT's: one more layer, then a product with the word embeddings, which the model ties to `decoder`."""

    def __init__(self, config: BertTextConfig):
        super().__init__()
        self.fc = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    @torch.no_grad()
    def resize(self, rows: int, std: float | None = None) -> None:
        """Score `rows` tokens: the first as before, new ones as the mean of all, or drawn by the deviation `std`."""
        old, kept = self.decoder, min(rows, self.decoder.out_features)
        weight, bias = old.weight.mean(dim=0).repeat(rows, 1), old.bias.mean().repeat(rows)
        if std is not None:
            weight, bias = weight.normal_(std=std), bias.zero_()
        weight[:kept], bias[:kept] = old.weight[:kept], old.bias[:kept]
        self.decoder = nn.Linear(old.in_features, rows, device="meta")
        self.decoder.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
        self.decoder.bias = nn.Parameter(bias, requires_grad=old.bias.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, vocabulary)."""
        return self.decoder(self.norm(self.act(self.fc(x))))
