"""Every token of one side finds its best match among the tokens of the other."""

from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hfvlm.checks.ranges import check_integer
from hfvlm.losses.blocks import BLOCK, in_full_precision
from hfvlm.losses.processes import GatherRows, check_equal_rows, gather_rows, rank_and_size, sum_over


def late_interaction_scores(
    queries: Tensor, keys: Tensor, query_mask: Tensor | None = None, key_mask: Tensor | None = None
) -> Tensor:
    """Compute the mean over the tokens of a query of their largest similarity with a token of the key
    (FILIP, https://arxiv.org/abs/2111.07783, equations 1 to 4). Not symmetric.

    Some queries are compared at a time, and again for the gradient: the token similarities of all pairs are never
    held at once.

    Args:
        queries: `(A, N, D)` tokens of unit length.
        keys: `(B, M, D)` tokens of unit length.
        query_mask: `(A, N)`, True where a token counts.
        key_mask: `(B, M)`, True where a token may be matched.

    Returns:
        `(A, B)`, in float32 or better.
    """
    with in_full_precision(queries) as dtype:
        queries, keys = queries.to(dtype), keys.to(dtype)
    blocks = query_blocks(queries, keys, query_mask)
    return torch.cat([checkpoint(scores, *block, keys, key_mask, use_reentrant=False) for block in blocks])


def query_blocks(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Split queries so that each part makes one block of token similarities, each with its mask."""
    height = max(1, BLOCK // (queries.shape[1] * keys.shape[0] * keys.shape[1]))
    parts = queries.split(height)
    return zip(parts, repeat(None) if mask is None else mask.split(height), strict=False)


def scores(queries: Tensor, query_mask: Tensor | None, keys: Tensor, key_mask: Tensor | None) -> Tensor:
    """Compute `late_interaction_scores`, all at once."""
    similarity = torch.einsum("and,bmd->anbm", queries, keys)
    if key_mask is not None:
        similarity = similarity.masked_fill(~key_mask.bool(), -torch.inf)
    best = similarity.max(dim=-1).values
    if query_mask is None:
        return best.mean(dim=1)
    weight = query_mask.to(best.dtype).unsqueeze(-1)
    return (best * weight).sum(dim=1) / weight.sum(dim=1)


def late_interaction_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    *,
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
    top_k: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Compute InfoNCE over `late_interaction_scores`, in both directions, averaged.

    Args:
        a: `(B, N, D)` tokens of unit length.
        b: `(B, M, D)`, row i belongs to row i of `a`.
        logit_scale: the temperature's inverse, already exponentiated; of one element.
        a_mask: `(B, N)`, True where a token counts; None for all.
        b_mask: `(B, M)`, likewise.
        top_k: only the `top_k` tokens of each row that resemble its positive's most may be matched by others, as in
            the public reproduction (https://github.com/Sense-GVT/DeCLIP at 5d99a85, 16) and, for less memory, in
            the paper's section 3.3. None lets all.
        group: see `contrastive_loss`.
    """
    if len(a) != len(b) or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"Row i belongs to row i, but got {tuple(a.shape)} and {tuple(b.shape)}.")
    check_equal_rows(a, group)
    with in_full_precision(a) as dtype:
        a, b = a.to(dtype), b.to(dtype)
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=a.device).reshape(())
        keys_a, keys_b, keys_a_mask, keys_b_mask = a, b, a_mask, b_mask
        if top_k is not None:
            keys_a, keys_a_mask = most_alike(a, b, a_mask, b_mask, top_k)
            keys_b, keys_b_mask = most_alike(b, a, b_mask, a_mask, top_k)
        directions = (a, keys_b, a_mask, keys_b_mask), (b, keys_a, b_mask, keys_a_mask)
        loss = torch.stack([one_direction(*direction, scale, group) for direction in directions]).mean()
        _, size = rank_and_size(group)
        return loss + (sum_over(loss.detach().clone(), group) / size - loss.detach())


def one_direction(
    queries: Tensor,
    keys: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor,
    group: ProcessGroup | None,
) -> Tensor:
    """Compute the mean cross-entropy of this process' queries among the keys of all processes."""
    rank, _ = rank_and_size(group)
    keys = GatherRows.apply(keys, group)
    key_mask = None if key_mask is None else gather_rows(key_mask, group)

    def costs(part: Tensor, mask: Tensor | None, target: Tensor) -> Tensor:
        logits = logit_scale * scores(part, mask, keys, key_mask)
        return F.cross_entropy(logits, target, reduction="sum")

    total, first = torch.zeros_like(logit_scale), rank * len(queries)
    for part, mask in query_blocks(queries, keys, query_mask):
        target = torch.arange(first, first + len(part), device=part.device)
        total = total + checkpoint(costs, part, mask, target, use_reentrant=False)
        first += len(part)
    return total / len(queries)


def most_alike(
    tokens: Tensor, positive: Tensor, mask: Tensor | None, positive_mask: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor | None]:
    """Select the `top_k` tokens of each row whose similarities with all of its positive's tokens have the largest sum.

    `(B, N, D)` -> `(B, top_k, D)`, and which of them count, `(B, top_k)`.
    """
    positions = positions_of_most_alike(tokens, positive, mask, positive_mask, top_k)
    chosen = tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    return chosen, None if mask is None else mask.gather(1, positions)


@torch.no_grad()
def positions_of_most_alike(
    tokens: Tensor, positive: Tensor, mask: Tensor | None, positive_mask: Tensor | None, top_k: int
) -> Tensor:
    """Return the positions of those tokens, `(B, top_k)`."""
    if check_integer("top_k", top_k) > tokens.shape[1]:
        raise ValueError(f"top_k is {top_k}, a row has {tokens.shape[1]} tokens.")
    weight = None if positive_mask is None else positive_mask.to(positive.dtype).unsqueeze(-1)
    whole = (positive if weight is None else positive * weight).sum(dim=1)
    likeness = torch.einsum("bnd,bd->bn", tokens, whole)
    if mask is not None:
        likeness = likeness.masked_fill(~mask.bool(), -torch.inf)
    return likeness.topk(top_k, dim=1).indices
