"""The best of several vectors of one side stands for it: BLIP-2 (https://arxiv.org/abs/2301.12597, section 3.2)."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from hfvlm.checks.ranges import check_number
from hfvlm.losses.blocks import in_full_precision
from hfvlm.losses.late_interaction import late_interaction_scores
from hfvlm.losses.processes import GatherRows, check_equal_rows, positives, rank_and_size, sum_over


def best_query_scores(queries: Tensor, vectors: Tensor) -> Tensor:
    """Compare `(A, Q, D)` and `(B, D)`, of unit length -> `(A, B)`, the cosine of the query that fits best.

    Some rows are compared at a time, and again for the gradient.
    """
    return late_interaction_scores(vectors.unsqueeze(1), queries).t()


def best_query_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    pair_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Compute the cross-entropy over `best_query_scores`, in both directions, averaged.

    Args:
        a: `(B, Q, D)` queries of unit length.
        b: `(B, D)`, row i belongs to row i of `a`.
        logit_scale: the temperature's inverse, already exponentiated; of one element.
        logit_bias: without effect; all losses of pairs take the same four.
        pair_ids: `(B,)`, equal for pairs about the same thing, which share the target.
        label_smoothing: share of the target that is spread over all rows.
        group: see `contrastive_loss`.

    Raises:
        ValueError: `a` and `b` have different numbers of rows, or the processes hold different numbers of them.
    """
    if len(a) != len(b) or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"Row i belongs to row i, but got {tuple(a.shape)} and {tuple(b.shape)}.")
    check_number("label_smoothing", label_smoothing, 0, 1)
    check_equal_rows(a, group)
    with in_full_precision(a) as dtype:
        a, b = a.to(dtype), b.to(dtype)
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=a.device).reshape(())
        same = positives(len(a), pair_ids, a.device, group).to(dtype)
        targets = same / same.sum(dim=1, keepdim=True)
        logits = (
            best_query_scores(a, GatherRows.apply(b, group)),
            best_query_scores(GatherRows.apply(a, group), b).t(),
        )
        losses = [F.cross_entropy(scale * x, targets, label_smoothing=label_smoothing) for x in logits]
        loss = torch.stack(losses).mean()
        _, size = rank_and_size(group)
        return loss + (sum_over(loss.detach().clone(), group) / size - loss.detach())
