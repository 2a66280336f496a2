"""Softmax over the pairs of a batch."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from hfvlm.losses.blocks import check_pairs, in_full_precision, row_blocks
from hfvlm.losses.processes import check_equal_rows, gather_rows, rank_and_size, scatter_sum, sum_over


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
) -> Tensor:
    """InfoNCE in both directions, averaged (CLIP, https://arxiv.org/abs/2103.00020, figure 3).

    The `(B, B)` logits are never held at once: memory grows as `B * D`. Value and gradients are those of the plain
    formula in float32, whatever the precision of the embeddings.

    Args:
        a: `(B, D)` embeddings of unit length.
        b: `(B, D)`, row i belongs to row i of `a`.
        logit_scale: the temperature's inverse, already exponentiated; of one element.
        logit_bias: without effect, since a softmax knows no offset; all losses of pairs take the same four.
        label_smoothing: share of the target that is spread over all rows.
        group: processes whose batches are one, `torch.distributed.group.WORLD` for all; None for this process alone.
            Each returns the value of the whole batch, and gradients whose *average* over the processes, as
            DistributedDataParallel forms it for parameters, is that of one process with the whole batch.

    Raises:
        ValueError: `a` and `b` are of different shape, or the processes hold different numbers of rows.
    """
    check_pairs(a, b)
    check_equal_rows(a, group)
    with in_full_precision(a) as dtype:
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=a.device).reshape(())
        return _Contrastive.apply(a.to(dtype), b.to(dtype), scale, label_smoothing, group)


class _Contrastive(torch.autograd.Function):
    """Own rows of `a` against all rows of `b`, some at a time; the logits are computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, smoothing: float, group: ProcessGroup | None) -> Tensor:
        rank, size = rank_and_size(group)
        everything = gather_rows(b, group)
        total, first = len(everything), rank * len(a)
        row_sums, column_sums = a.new_empty(len(a)), a.new_full((total,), -torch.inf)
        for rows, logits in row_blocks(a, everything, scale):
            row_sums[rows] = logits.logsumexp(dim=1)
            column_sums = torch.logaddexp(column_sums, logits.logsumexp(dim=0))
        if size > 1:
            column_sums = gather_rows(column_sums.unsqueeze(0), group).logsumexp(dim=0)

        own = slice(first, first + len(a))
        matching = (a * b).sum() * (1 - smoothing)
        average = (a.sum(dim=0) * everything.mean(dim=0)).sum() * smoothing
        value = (row_sums.sum() + column_sums[own].sum()) / 2 - scale * (matching + average)
        ctx.save_for_backward(a, b, scale, row_sums, column_sums)
        ctx.smoothing, ctx.group = smoothing, group
        return sum_over(value, group) / total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        a, b, scale, row_sums, column_sums = ctx.saved_tensors
        rank, size = rank_and_size(ctx.group)
        everything = gather_rows(b, ctx.group)
        total, first = len(everything), rank * len(a)
        grad_a, grad_b = torch.empty_like(a), torch.zeros_like(everything)
        for rows, logits in row_blocks(a, everything, scale):
            # d loss / d logits, times twice the number of rows
            slope = (logits - row_sums[rows, None]).exp_()
            slope += logits.sub_(column_sums).exp_()
            slope.diagonal(first + rows.start).sub_(2 * (1 - ctx.smoothing))
            if ctx.smoothing:
                slope -= 2 * ctx.smoothing / total
            grad_a[rows] = slope @ everything
            grad_b.addmm_(slope.t(), a[rows])
        # The average over the processes is to be the gradient of the whole batch.
        each = gradients[0] / (2 * total)
        grad_scale = sum_over((a * grad_a).sum(), ctx.group) * each
        each = each * scale * size
        return grad_a * each, scatter_sum(grad_b, ctx.group) * each, grad_scale, None, None
