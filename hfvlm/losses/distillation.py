"""Softmax against targets that are a teacher's: over candidates that it remembers, or over the rows of a batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from hfvlm.checks.ranges import check_number
from hfvlm.losses.blocks import check_pairs, in_full_precision, row_blocks
from hfvlm.losses.processes import check_equal_rows, gather_rows, rank_and_size, sum_over
from hfvlm.losses.soft_pairs import soft_pairs

Targets = Tensor | Callable[[slice], Tensor]


def soft_contrastive_loss(
    a: Tensor, candidates: Tensor, targets: Targets, logit_scale: Tensor, *, group: ProcessGroup | None = None
) -> Tensor:
    """Compute the cross-entropy of `softmax(scale * a @ candidates.T)` against soft targets, per row.

    It is one direction of the image-text contrastive loss of ALBEF (https://arxiv.org/abs/2107.07651, section 3.2)
    and BLIP.

    Value and gradients come out of one pass over blocks of the logits. The candidates, a teacher's embeddings of the
    batch and its queue, get no gradient.

    Args:
        a: `(B, D)` embeddings of unit length.
        candidates: `(M, D)`.
        targets: `(B, M)`, rows that sum to 1; or a function from a slice of the rows to theirs, so that never all of
            them are held (`lambda rows: distilled_targets(teacher[rows], ...)`).
        logit_scale: the temperature's inverse, already exponentiated; of one element.
        group: processes with rows of their own and the same queue; each returns the mean over all rows.

    Raises:
        ValueError: the processes hold different numbers of rows.
    """
    check_equal_rows(a, group)
    with in_full_precision(a) as dtype:
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=a.device).reshape(())
        return _SoftContrastive.apply(a.to(dtype), candidates.detach().to(dtype), scale, targets, group)


@torch.no_grad()
def distilled_targets(
    teacher: Tensor, candidates: Tensor, logit_scale: Tensor, right: Tensor, distillation: float
) -> Tensor:
    """Mix what belongs together with what is similar to the teacher.

    Args:
        teacher: `(B, D)`, the teacher's embeddings of the rows.
        candidates: `(M, D)`.
        logit_scale: the temperature's inverse.
        right: `(B, M)`, which candidates belong to each row; they share its probability.
        distillation: the teacher's part, 0 to 1.

    Returns:
        `(B, M)`, probabilities.
    """
    check_number("distillation", distillation, 0, 1)
    shares = right.to(teacher) / right.sum(dim=1, keepdim=True)
    return distillation * (teacher @ candidates.t() * logit_scale).softmax(dim=1) + (1 - distillation) * shares


def affinity_loss(
    a: Tensor,
    b: Tensor,
    teacher_a: Tensor,
    teacher_b: Tensor,
    logit_scale: Tensor,
    teacher_scale: Tensor,
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Compute the cross-entropy of a dual encoder's similarities in a batch against its teacher's, in both directions,
    averaged (affinity mimicking of TinyCLIP, https://arxiv.org/abs/2309.12314, section 3.1, which adds the two).

    The teacher's embeddings may have another size; they get no gradient.

    Args:
        a: `(B, D)` embeddings of unit length.
        b: `(B, D)`, row i belongs to row i of `a`.
        teacher_a: `(B, E)`, the teacher's of the same rows, of unit length.
        teacher_b: `(B, E)`.
        logit_scale: the temperature's inverse, already exponentiated; of one element.
        teacher_scale: the teacher's.
        group: see `contrastive_loss`.

    Raises:
        ValueError: there are not as many rows of each, or the processes hold different numbers of rows.
    """
    check_pairs(a, b)
    check_pairs(teacher_a, teacher_b)
    if len(a) != len(teacher_a):
        raise ValueError(f"The teacher embedded {len(teacher_a)} rows, and the student {len(a)}.")
    ours, theirs = (a, b), (teacher_a.detach(), teacher_b.detach())
    losses = []
    for queries, keys, teachers, others in ((*ours, *theirs), (*ours[::-1], *theirs[::-1])):
        everything = gather_rows(others, group)

        def similar(rows: slice, logits: Tensor, teachers: Tensor = teachers, every: Tensor = everything) -> Tensor:
            return (teachers[rows].to(logits) @ every.to(logits).t() * teacher_scale).softmax(dim=1)

        losses.append(soft_pairs(queries, keys, logit_scale, similar, group))
    return (losses[0] + losses[1]) / 2


class _SoftContrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, candidates: Tensor, scale: Tensor, targets: Targets, group: ProcessGroup | None
    ) -> Tensor:
        value, grad_a, grad_scale = torch.zeros_like(scale), torch.empty_like(a), torch.zeros_like(scale)
        for rows, logits in row_blocks(a, candidates, scale):
            wanted = (targets[rows] if isinstance(targets, Tensor) else targets(rows)).to(logits)
            sums = logits.logsumexp(dim=1)
            value += (sums - (wanted * logits).sum(dim=1)).sum()
            slope = (logits - sums[:, None]).exp_() - wanted
            grad_scale += (slope * logits).sum() / scale
            grad_a[rows] = slope @ candidates * scale
        ctx.save_for_backward(grad_a / len(a), grad_scale / len(a))
        _, size = rank_and_size(group)
        return sum_over(value / len(a), group) / size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_a, grad_scale = ctx.saved_tensors
        return grad_a * gradients[0], None, grad_scale * gradients[0], None, None
