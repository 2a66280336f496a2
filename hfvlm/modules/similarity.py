"""Cosine similarities to logits."""

from math import log
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hfvlm.losses.blocks import in_full_precision


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Multiply `(N, D)` and `(M, D)`, of unit length, to `(N, M)` in float32 or better, also where the model computes
    in half precision, whose steps are larger than the deltas that matter at a high temperature."""
    with in_full_precision(a) as dtype:
        return a.to(dtype) @ b.to(dtype).t()


class LogitScale(nn.Module):
    """Multiplies by a learned temperature, stored as a logarithm: `exp(scale) * cosine`.

    A module of its own, with a parameter of one dimension, so that PEFT's `modules_to_save=["logit_scale"]` trains
    it and FSDP2 shards it.
    """

    bias: nn.Parameter | None

    def __init__(self, initial: float):
        super().__init__()
        self.initial = initial
        self.scale = nn.Parameter(torch.zeros(1))
        self.register_parameter("bias", None)

    def init_own_weights(self, std: float) -> None:
        init.constant_(self.scale, self.initial)

    def exp(self) -> Tensor:
        """Return the factor itself, shape (1,)."""
        return self.factor_and_bias()[0]

    def factor_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return what cosines are multiplied by, and what is added, if anything is, each of shape (1,)."""
        return self()  # only a call loads offloaded parameters

    def factor(self) -> Tensor:
        return self.scale.exp()

    @torch.no_grad()
    def clamp_(self, lowest: float | None, highest: float | None) -> None:
        """Bound the factor, on one side or on both."""
        self.scale.clamp_(*(bound and log(bound) for bound in (lowest, highest)))

    def forward(self, cosine: Tensor | None = None) -> Any:
        """Turn cosines into logits; without any, see `factor_and_bias`."""
        if cosine is None:
            return self.factor(), self.bias
        logits = cosine * self.factor()
        return logits if self.bias is None else logits + self.bias


class Temperature(LogitScale):
    """Divides by a learned temperature, stored as it is: `cosine / scale`."""

    def factor(self) -> Tensor:
        return self.scale.reciprocal()

    @torch.no_grad()
    def clamp_(self, lowest: float | None, highest: float | None) -> None:
        self.scale.clamp_(*(bound and 1 / bound for bound in (highest, lowest)))


class FixedTemperature(Temperature):
    """Divides by a temperature that is neither learned nor in a file."""

    def __init__(self, initial: float):
        super().__init__(initial)
        del self.scale
        self.register_buffer("scale", torch.full((1,), initial), persistent=False)


class BiasedLogitScale(LogitScale):
    """`exp(scale) * cosine + bias`: for losses of each pair on its own."""

    bias: nn.Parameter

    def __init__(self, initial: float, initial_bias: float):
        super().__init__(initial)
        self.initial_bias = initial_bias
        self.bias = nn.Parameter(torch.zeros(1))

    def init_own_weights(self, std: float) -> None:
        super().init_own_weights(std)
        init.constant_(self.bias, self.initial_bias)
