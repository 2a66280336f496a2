"""Next-token prediction."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from hfvlm.losses.processes import rank_and_size, sum_over


def captioning_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Cross-entropy per token, averaged over the tokens that count.

    Args:
        logits: `(B, N, V)`.
        labels: `(B, N)`, the token that each row of logits is to predict: already shifted.
        ignore_index: the label of places that do not count.
        label_smoothing: share of the target that is spread over the vocabulary.
        group: processes whose tokens are averaged as one batch; see `contrastive_loss`.
    """
    flat = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten()
    total = F.cross_entropy(*flat, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum")
    _, size = rank_and_size(group)
    count = sum_over((labels != ignore_index).sum(), group)
    loss = total * size / count.clamp_min(1)
    return loss + (sum_over(loss.detach().clone(), group) / size - loss.detach())
