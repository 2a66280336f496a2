"""Softmax over all rows of a batch, each row against targets of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from hfvlm.losses.blocks import in_full_precision, row_blocks
from hfvlm.losses.processes import check_equal_rows, gather_rows, rank_and_size, scatter_sum, sum_over

# The slice of own rows and their logits `(rows, all)`, which may be masked in place -> targets `(rows, all)`.
Wanted = Callable[[slice, Tensor], Tensor]


def soft_pairs(a: Tensor, b: Tensor, logit_scale: Tensor, wanted: Wanted, group: ProcessGroup | None) -> Tensor:
    """Compute the cross-entropy of `softmax(scale * a @ b.T)` against targets, per row of `a`.

    Value and gradients come out of one pass over blocks of the logits; both sides get gradients.

    Args:
        a: `(B, D)`.
        b: `(B, D)`; with a group, the rows of all processes are compared with.
        logit_scale: the temperature's inverse, of one element.
        wanted: gives the targets of some rows, which sum to 1.
        group: see `contrastive_loss`.

    Raises:
        ValueError: the processes hold different numbers of rows.
    """
    check_equal_rows(a, group)
    with in_full_precision(a) as dtype:
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=a.device).reshape(())
        return _SoftPairs.apply(a.to(dtype), b.to(dtype), scale, wanted, group)


class _SoftPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, wanted: Wanted, group: ProcessGroup | None) -> Tensor:
        everything = gather_rows(b, group)
        value, grad_scale = torch.zeros_like(scale), torch.zeros_like(scale)
        grad_a, grad_all = torch.empty_like(a), torch.zeros_like(everything)
        for rows, logits in row_blocks(a, everything, scale):
            targets = wanted(rows, logits)
            sums = logits.logsumexp(dim=1)
            value += sums.sum() - (targets * logits).sum()
            slope = (logits - sums[:, None]).exp_() - targets
            grad_scale += (slope * logits).sum() / scale
            grad_a[rows] = slope @ everything
            grad_all.addmm_(slope.t(), a[rows])
        each = scale / len(a)
        ctx.save_for_backward(grad_a * each, scatter_sum(grad_all, group) * each, grad_scale / len(a))
        _, size = rank_and_size(group)
        return sum_over(value / len(a), group) / size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_a, grad_b, grad_scale = ctx.saved_tensors
        return grad_a * gradients[0], grad_b * gradients[0], grad_scale * gradients[0], None, None
