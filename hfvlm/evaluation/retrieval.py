"""The metrics of retrieval: finding the positives of a row among those of another modality."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hfvlm.checks.ranges import check_integer

BLOCK = 2**24


def recall_at(
    queries: Tensor,
    gallery: Tensor,
    ks: Sequence[int],
    query_ids: Tensor | None = None,
    gallery_ids: Tensor | None = None,
    *,
    score: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[int, float]:
    """Return the share of queries that have a positive among the k best of the gallery.

    Equal scores count against a query: a model whose embeddings are all the same finds nothing.

    Args:
        queries: `(N, D)` embeddings.
        gallery: `(M, D)` embeddings.
        ks: as (1, 5, 10).
        query_ids: `(N,)`, by default 0, 1, 2, ...
        gallery_ids: `(M,)`; rows with equal ids are positives, as an image and each of its captions.
        score: queries `(B, D)` and a gallery `(M, D)` -> `(B, M)`; by default their product.

    Raises:
        ValueError: a query has no positive in the gallery, or a k is no number of rows.
    """
    ks = [check_integer("k", k) for k in ks]
    ranks = positive_ranks(queries, gallery, query_ids, gallery_ids, score=score)
    return {k: (ranks < k).double().mean().item() for k in ks}


def positive_ranks(
    queries: Tensor,
    gallery: Tensor,
    query_ids: Tensor | None = None,
    gallery_ids: Tensor | None = None,
    *,
    score: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Count, `(N,)`, the negatives that score as high as a query's best positive; arguments as `recall_at`."""
    query_ids = torch.arange(len(queries), device=queries.device) if query_ids is None else query_ids
    gallery_ids = torch.arange(len(gallery), device=gallery.device) if gallery_ids is None else gallery_ids
    ranks = []
    for part, ids in zip(*(x.split(max(1, BLOCK // max(1, len(gallery)))) for x in (queries, query_ids)), strict=True):
        scores = part @ gallery.t() if score is None else score(part, gallery)
        positive = ids[:, None] == gallery_ids
        if not positive.any(dim=1).all():
            raise ValueError(f"Query {int(ids[~positive.any(dim=1)][0])} has no positive in the gallery.")
        ranks.append(ranks_of_best(scores, positive))
    return torch.cat(ranks)


def ranks_of_best(scores: Tensor, positive: Tensor) -> Tensor:
    """Count, `(N,)`, the negatives that score as high as the best positive, of `(N, M)` scores and a mask of the
    positives.

    Scores that are NaN count against a row, too.
    """
    best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
    return (~(scores < best) & ~positive).sum(dim=1)
