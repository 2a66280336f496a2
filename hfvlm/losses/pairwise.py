"""Losses of each pair of rows on its own: a match or not."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from hfvlm.checks.ranges import check_number
from hfvlm.losses.blocks import check_pairs, in_full_precision, square_blocks
from hfvlm.losses.processes import check_equal_rows, pass_on, rank_and_size, sum_over


def sigmoid_loss(
    a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, *, group: ProcessGroup | None = None
) -> Tensor:
    """Compute `-log sigmoid(z * logit)` summed over all pairs, z = 1 for a match and -1 otherwise, per row
    (SigLIP, https://arxiv.org/abs/2303.15343, algorithm 1).

    Value and gradient come out of one pass over blocks of the logits. Over several processes, the rows of `b` travel
    round a ring, so that no process ever holds all of them.

    Args:
        a: `(B, D)` embeddings of unit length.
        b: `(B, D)`, row i belongs to row i of `a`.
        logit_scale: the temperature's inverse, already exponentiated; of one element.
        logit_bias: added to every logit; of one element.
        group: see `contrastive_loss`.

    Raises:
        ValueError: `a` and `b` are of different shape, the processes hold different numbers of rows, or there is no
            bias.
    """
    if logit_bias is None:
        raise ValueError(
            "sigmoid_loss needs a logit_bias, which this model has not: it was trained with a softmax. Use "
            "contrastive_loss, or pass a bias, such as -10 at the start of training."
        )
    return focal_contrastive_loss(a, b, logit_scale, logit_bias, gamma=0.0, group=group)


def focal_contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    gamma: float = 2.0,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Compute `sigmoid_loss` with terms weighted by `(1 - p) ** gamma`, p the probability of the truth: pairs that are
    classified well already count little (RO-ViT, https://arxiv.org/abs/2305.07011, section 3.2; used by MaMMUT,
    https://arxiv.org/abs/2303.16839).

    The papers average both directions of the double sum, which are equal, and add no bias. Arguments and errors as
    `sigmoid_loss`.
    """
    check_number("gamma", gamma, 0)
    check_pairs(a, b)
    check_equal_rows(a, group)
    logit_bias = torch.zeros(()) if logit_bias is None else logit_bias
    with in_full_precision(a) as dtype:
        scale, bias = (torch.as_tensor(x, dtype=dtype, device=a.device).reshape(()) for x in (logit_scale, logit_bias))
        return _Pairwise.apply(a.to(dtype), b.to(dtype), scale, bias, gamma, group)


class _Pairwise(torch.autograd.Function):
    """No term needs another one, so the gradient is complete when the value is."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, gamma: float, group: ProcessGroup | None
    ) -> Tensor:
        _, size = rank_and_size(group)
        # The blocks take matches for mismatches; a match's term is that of a mismatch of the opposite logit.
        matches = (a * b).sum(dim=1) * scale + bias
        wrong_terms, wrong_slope = mismatch(matches.clone(), gamma)
        right_terms, right_slope = mismatch(-matches, gamma)
        value, correction = right_terms - wrong_terms, -(right_slope + wrong_slope)
        grad_a, grad_visitors = (correction[:, None] * x for x in (b, a))
        visitors, grad_bias = b, correction.sum()
        for _ in range(size):
            for rows, columns, logits in square_blocks(a, visitors, scale):
                terms, slope = mismatch(logits.add_(bias), gamma)
                value += terms
                grad_a[rows].addmm_(slope, visitors[columns])
                grad_visitors[columns].addmm_(slope.t(), a[rows])
                grad_bias += slope.sum()
            visitors, grad_visitors = pass_on([visitors, grad_visitors], group)
        grad_scale = (a * grad_a).sum()
        each, total = scale / len(a), len(a) * size
        ctx.save_for_backward(
            grad_a.mul_(each),
            grad_visitors.mul_(each),
            sum_over(grad_scale, group) / total,
            sum_over(grad_bias, group) / total,
        )
        return sum_over(value, group) / total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradients[0] * saved for saved in ctx.saved_tensors), None, None)


def mismatch(logits: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Compute the sum of `q ** gamma * softplus(logits)`, `q = sigmoid(logits)`, and its derivative, in place."""
    costs = F.softplus(logits)
    wrong = logits.sigmoid_()
    if gamma == 0:
        return costs.sum(), wrong
    weights = wrong**gamma
    costs *= weights
    slope = costs * (gamma * (1 - wrong)) + weights.mul_(wrong)
    return costs.sum(), slope
