"""Causal texts that begin alike: a token that follows the same tokens in several of them is computed once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class PrefixTree:
    """The distinct tokens of texts, of which tokens after the same tokens are one node.

    Layers run over the nodes as over the tokens of one long text, `(1, nodes, D)`; attention alone spreads them to the
    texts. There is no padding among the nodes.

    Args:
        tokens: `(B, N)`, ids of texts, -1 where a row has no token; the last that it has is pooled.

    Attributes:
        ids: `(R, N)`, the distinct rows.
        ends: `(R,)`, the position of the last token of each.
        texts: `(B,)`, which of them each text is.
        first: `(nodes,)`, where the nodes are first found in the flattened `ids`.
        nodes: `(R, N)`, the node of each token; any where there is none.
    """

    def __init__(self, tokens: Tensor):
        # Sorted, so that texts which begin alike are next to each other.
        self.ids, self.texts = torch.unique(tokens, dim=0, return_inverse=True)
        used = self.ids >= 0
        columns, rows = (torch.arange(size, device=tokens.device) for size in (used.shape[1], used.shape[0]))
        self.ends = (used * columns).amax(dim=1)
        differs = torch.ones_like(used)
        differs[1:] = (self.ids[1:] != self.ids[:-1]).cumsum(dim=1) > 0
        owners = torch.where(differs, rows.unsqueeze(-1), 0).cummax(dim=0).values
        new = (differs & used).flatten()
        self.first = new.nonzero().squeeze(-1)
        self.nodes = (new.cumsum(dim=0) - 1).view_as(self.ids).gather(0, owners)

    def distinct(self, rows: Tensor) -> Tensor:
        """Take the rows of the distinct texts: `(B, ...)` -> `(R, ...)`."""
        return rows.new_empty(self.ids.shape[0], *rows.shape[1:]).index_copy(0, self.texts, rows)

    def gather(self, x: Tensor) -> Tensor:
        """Take the nodes of the tokens of the distinct texts: `(R, N, ...)` -> `(1, nodes, ...)`."""
        return x.flatten(0, 1).index_select(0, self.first).unsqueeze(0)

    def spread(self, heads: Tensor) -> Tensor:
        """Put the nodes' heads where they are in the texts: `(1, heads, nodes, size)` -> `(R, heads, N, size)`."""
        rows = heads.squeeze(0).transpose(0, 1).index_select(0, self.nodes.flatten())
        return rows.unflatten(0, self.nodes.shape).transpose(1, 2)

    def pool(self, x: Tensor) -> Tensor:
        """Take the last token of each distinct text: `(1, nodes, D)` -> `(R, D)`."""
        return x[0, self.nodes.gather(1, self.ends.unsqueeze(-1)).squeeze(-1)]

    def attend(
        self,
        attention: Callable[..., tuple[Tensor, Tensor | None]],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Call an attention function with keys and values, `(1, heads, nodes, size)`, spread to the texts.

        Queries are of the nodes as well, and so is then the output; or they are `(R, heads, 1, size)`, of the texts.
        """
        if query.shape[0] == self.ids.shape[0] and query.shape[2] == 1:
            return attention(module, query, self.spread(key), self.spread(value), *args, **kwargs)
        query, key, value = self.spread(query), self.spread(key), self.spread(value)
        out, _ = attention(module, query, key, value, *args, **kwargs)
        return self.gather(out), None
