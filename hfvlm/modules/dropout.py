"""What is left out at random in training."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Stochastic depth: in training, whole rows become zero at `rate`, and the others grow to make up for them."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


class PatchDropout(nn.Module):
    """In training, a share `rate` of the patches of each image is left out
    (FLIP, https://arxiv.org/abs/2212.00794).

    It comes after the positions were added, so the order of the patches that stay means nothing.

    Args:
        rate: share that is left out; at least one patch stays.
        prefix: tokens before the patches, which stay, as a class token.
    """

    def __init__(self, rate: float, prefix: int = 0):
        super().__init__()
        self.rate = rate
        self.prefix = prefix

    def forward(self, x: Tensor, frames: int = 1) -> Tensor:
        """`(B * frames, prefix + N, D)` -> `(B * frames, prefix + kept, D)`; frames of a video keep equal patches."""
        kept = self.choose(x, frames)
        return x if kept is None else x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def choose(self, x: Tensor, frames: int = 1) -> Tensor | None:
        """Choose the tokens that stay: `(B * frames, prefix + kept)` positions, the prefix first; None for all."""
        if not self.training or self.rate == 0:
            return None
        patches = x.shape[1] - self.prefix
        kept = max(1, int(patches * (1 - self.rate)))
        chosen = torch.randn(x.shape[0] // frames, patches, device=x.device).topk(kept, dim=-1).indices
        chosen = (chosen + self.prefix).repeat_interleave(frames, dim=0)
        prefix = torch.arange(self.prefix, device=x.device).expand(x.shape[0], -1)
        return torch.cat([prefix, chosen], dim=1)
