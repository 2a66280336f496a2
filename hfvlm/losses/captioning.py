"""Next-token prediction."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from hfvlm.checks.ranges import check_number
from hfvlm.losses.processes import rank_and_size, sum_over


def token_losses(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy of each token, `(B, N)`, 0 where it does not count; see `captioning_loss`."""
    check_number("label_smoothing", label_smoothing, 0, 1)
    flat = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten()
    losses = F.cross_entropy(*flat, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    return losses.view(labels.shape)


def captioning_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_items: Tensor | int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Compute the cross-entropy per token, averaged over the tokens that count.

    Args:
        logits: `(B, N, V)`.
        labels: `(B, N)`, the token that each row of logits is to predict: already shifted.
        ignore_index: the label of positions that do not count.
        label_smoothing: share of the target that is spread over the vocabulary.
        num_items: how many tokens count, where the caller knows of more of them: the Trainer, of those of all the
            batches whose gradients it adds up.
        group: processes whose tokens are averaged as one batch; see `contrastive_loss`.
    """
    total = token_losses(logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing).sum()
    if num_items is not None:
        return total / num_items
    return average_losses(total, (labels != ignore_index).sum(), group)


def average_losses(total: Tensor, count: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Average a sum of the losses of `count` tokens, over one process or several; see `captioning_loss`."""
    _, size = rank_and_size(group)
    loss = total * size / sum_over(count.clone(), group).clamp_min(1)
    return loss + (sum_over(loss.detach().clone(), group) / size - loss.detach())
