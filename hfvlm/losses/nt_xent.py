"""Softmax over both views of all images of a batch."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hfvlm.losses.blocks import check_pairs
from hfvlm.losses.processes import rank_and_size
from hfvlm.losses.soft_pairs import soft_pairs


def nt_xent_loss(a: Tensor, b: Tensor, logit_scale: Tensor, *, group: ProcessGroup | None = None) -> Tensor:
    """Compute the normalised, temperature-scaled cross-entropy of two views of each image (SimCLR,
    https://arxiv.org/abs/2002.05709, equation 1).

    Of 2N views, each is compared with all but itself: its other view is the positive, and the 2N - 2 views of the
    other images are the negatives, those on its own side included, which `contrastive_loss` leaves out.

    Args:
        a: `(N, D)` embeddings of unit length.
        b: `(N, D)`, row i is another view of row i of `a`.
        logit_scale: the temperature's inverse, of one element.
        group: see `contrastive_loss`.

    Returns:
        The mean over the 2N views.

    Raises:
        ValueError: `a` and `b` are of different shape, or the processes hold different numbers of rows.
    """
    check_pairs(a, b)
    views = torch.stack([a, b], dim=1).flatten(0, 1)
    first = rank_and_size(group)[0] * len(views)

    def partners(rows: slice, logits: Tensor) -> Tensor:
        own = torch.arange(rows.start, rows.stop, device=logits.device) + first
        # Finite: it is multiplied by a target of 0.
        logits.scatter_(1, own[:, None], torch.finfo(logits.dtype).min / 2)
        return torch.zeros_like(logits).scatter_(1, (own ^ 1)[:, None], 1.0)

    return soft_pairs(views, views, logit_scale, partners, group)
