"""Losses that pull the two halves of a pair together and push other pairs apart."""

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(a: Tensor, b: Tensor, logit_scale: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Softmax InfoNCE in both directions, averaged (CLIP, https://arxiv.org/abs/2103.00020, figure 3).

    Args:
        a: `(B, D)` embeddings of unit length.
        b: `(B, D)`, row i belongs to row i of `a`.
        logit_scale: the temperature's inverse, already exponentiated.
    """
    check_pairs(a, b)
    logits = logit_scale * a @ b.t()
    target = torch.arange(len(a), device=a.device)
    forward = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    return (forward + F.cross_entropy(logits.t(), target, label_smoothing=label_smoothing)) / 2


def sigmoid_loss(a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Every pair of rows on its own is a match or not (SigLIP, https://arxiv.org/abs/2303.15343, algorithm 1).

    Args:
        a: `(B, D)` embeddings of unit length.
        b: `(B, D)`, row i belongs to row i of `a`.
        logit_scale: the temperature's inverse, already exponentiated.
        logit_bias: added to every logit.
    """
    check_pairs(a, b)
    logits = logit_scale * a @ b.t() + logit_bias
    sign = 2 * torch.eye(len(a), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(a)


def check_pairs(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"A contrastive loss compares row i with row i, but got {tuple(a.shape)} and {tuple(b.shape)}: pass as "
            "many texts as images, or leave return_loss out."
        )
