"""Softmax over pairs and further candidates of one side."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hfvlm.losses.blocks import check_pairs, in_full_precision
from hfvlm.losses.processes import GatherRows, check_equal_rows


def candidate_losses(
    a: Tensor, b: Tensor, logit_scale: Tensor, others: Tensor | None = None, *, group: ProcessGroup | None = None
) -> Tensor:
    """Compute each pair's InfoNCE in both directions, averaged (MERLOT Reserve, https://arxiv.org/abs/2201.02639).

    Args:
        a: `(B, D)` embeddings.
        b: `(B, D)`, row i belongs to row i of `a`.
        logit_scale: the temperature's inverse, already exponentiated; of one element.
        others: `(E, D)`, further candidates for rows of `a`, which belong to none of them.
        group: processes whose batches are one; see `contrastive_loss`.

    Returns:
        `(B,)`, of this process's pairs. Their mean is the loss.

    Raises:
        ValueError: `a` and `b` are of different shape, or the processes hold different numbers of rows.
    """
    check_pairs(a, b)
    check_equal_rows(a, group)
    with in_full_precision(a) as dtype:
        a, b = a.to(dtype), b.to(dtype)
        candidates = b if others is None else torch.cat([b, others.to(dtype)])
        check_equal_rows(candidates, group)
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=a.device).reshape(())
        forth = (scale * a) @ GatherRows.apply(candidates, group).t()
        back = (scale * b) @ GatherRows.apply(a, group).t()
        return (forth.logsumexp(dim=1) + back.logsumexp(dim=1)) / 2 - scale * (a * b).sum(dim=1)
