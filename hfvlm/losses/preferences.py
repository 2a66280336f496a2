"""Losses of pairs of answers, of which one is preferred."""

from torch import Tensor
from torch.nn import functional as F


def preference_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Compute the mean of `-log sigmoid(chosen - rejected - margin)` over pairs, the negative log-likelihood of the
    preferences under Bradley and Terry's model (https://arxiv.org/abs/2203.02155, equation 1; the margin is that of
    https://arxiv.org/abs/2307.09288, equation 2). It depends on differences alone: where zero lies is not learned.

    Args:
        chosen: `(B,)`, scores of the preferred answers.
        rejected: `(B,)`, scores of the others.
        margin: `(B,)`, by how much each is preferred; None for zero.

    Raises:
        ValueError: the shapes differ, or there is no pair.
    """
    shapes = {tuple(x.shape) for x in (chosen, rejected, margin) if x is not None}
    if len(shapes) > 1 or chosen.ndim != 1 or len(chosen) == 0:
        raise ValueError(f"preference_loss needs scores of one shape, (pairs,), not {sorted(shapes)}.")
    difference = chosen.float() - rejected.float()
    return -F.logsigmoid(difference if margin is None else difference - margin.to(difference)).mean()
