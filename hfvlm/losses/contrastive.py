"""Softmax over the pairs of a batch."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from hfvlm.checks.ranges import check_number
from hfvlm.losses.blocks import check_pairs, in_full_precision, square_blocks
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
    """Compute InfoNCE in both directions, averaged (CLIP, https://arxiv.org/abs/2103.00020, figure 3).

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
        ValueError: `a` and `b` are of different shape, the processes hold different numbers of rows, or
            label_smoothing is no share.
    """
    check_number("label_smoothing", label_smoothing, 0, 1)
    check_pairs(a, b)
    check_equal_rows(a, group)
    with in_full_precision(a) as dtype:
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=a.device).reshape(())
        return _Contrastive.apply(a.to(dtype), b.to(dtype), scale, label_smoothing, group)


class _Contrastive(torch.autograd.Function):
    """Own rows of `a` against all rows of `b`, in blocks, of which few are stored for the gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, smoothing: float, group: ProcessGroup | None) -> Tensor:
        everything = gather_rows(b, group)
        stored: dict[Any, Tensor] = {}
        row_sums, column_sums = (a.new_full((len(x),), -torch.inf) for x in (a, everything))
        for rows, columns, logits in square_blocks(a, everything, scale, stored):
            row_sums[rows] = torch.logaddexp(row_sums[rows], log_sum_exp(logits, dim=1))
            column_sums[columns] = torch.logaddexp(column_sums[columns], log_sum_exp(logits, dim=0))
        _, size = rank_and_size(group)
        if size > 1:
            column_sums = gather_rows(column_sums.unsqueeze(0), group).logsumexp(dim=0)

        matching = (a * b).sum() * (1 - smoothing)
        average = (a.sum(dim=0) * everything.mean(dim=0)).sum() * smoothing
        sums = row_sums.sum() + column_sums[own_rows(a, group)].sum()
        ctx.save_for_backward(a, b, scale, row_sums, column_sums)
        ctx.stored, ctx.smoothing, ctx.group = stored, smoothing, group
        return sum_over(sums / 2 - scale * (matching + average), group) / len(everything)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        a, b, scale, row_sums, column_sums = ctx.saved_tensors
        everything = gather_rows(b, ctx.group)
        total = len(everything)
        # The gradients times twice the number of rows; first the targets' part.
        right, spread = 2 * (1 - ctx.smoothing), 2 * ctx.smoothing / total
        grad_a = -right * b - spread * everything.sum(dim=0)
        grad_b = (-spread * a.sum(dim=0)).repeat(total, 1)
        grad_b[own_rows(a, ctx.group)] -= right * a
        for rows, columns, logits in square_blocks(a, everything, scale, ctx.stored):
            slope = (logits - row_sums[rows, None]).exp_()
            slope += (logits - column_sums[columns]).exp_()
            grad_a[rows].addmm_(slope, everything[columns])
            grad_b[columns].addmm_(slope.t(), a[rows])
        # The average over the processes is to be the gradient of the whole batch.
        each = gradients[0] / (2 * total)
        grad_scale = sum_over((a * grad_a).sum(), ctx.group) * each
        _, size = rank_and_size(ctx.group)
        each = each * scale * size
        return grad_a * each, scatter_sum(grad_b, ctx.group) * each, grad_scale, None, None


def own_rows(a: Tensor, group: ProcessGroup | None) -> slice:
    """Return the slice of this process's rows among those of all."""
    rank, _ = rank_and_size(group)
    return slice(rank * len(a), (rank + 1) * len(a))


def log_sum_exp(logits: Tensor, dim: int) -> Tensor:
    """Compute what `torch.logsumexp` does, which takes three times as long for what infinities would need."""
    highest = logits.amax(dim=dim, keepdim=True)
    return (logits - highest).exp_().sum(dim=dim).log_() + highest.squeeze(dim)
