"""Bases of text towers."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.losses.processes import all_processes, rank_and_size
from hfvlm.modeling.base import HfvlmPreTrainedModel, as_features, other_towers, records
from hfvlm.modeling.compat import causal_mask
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modules.embeddings import TokenEmbedding
from hfvlm.modules.parts import joined
from hfvlm.modules.pooling import end_of_text, last_position, tokens_at
from hfvlm.modules.positions import resize_line
from hfvlm.modules.prefixes import PrefixTree
from hfvlm.modules.projection import projection
from hfvlm.modules.transformer import PreNormLayer, Stack

logger = logging.get_logger(__name__)

# Share of the tokens of texts, padding included, up to which it pays to compute the distinct ones alone.
MOST_NODES = 0.75


def bucket_size(device: torch.device) -> int:
    """Return the number of tokens from which on a batch of its own pays: where a pass costs as its tokens, not as its
    launches. Processes that share a batch need equally many passes, which wait for each other: one."""
    if rank_and_size(all_processes())[1] > 1:
        return sys.maxsize
    return 1024 if device.type == "cpu" else 16384


def length_buckets(lengths: list[int], size: int) -> list[list[int]]:
    """Part rows of these lengths into buckets, shortest first, each in order: one ends before a longer row once all of
    its rows, as long as the longest of them, have `size` tokens."""
    buckets: list[list[int]] = [[]]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        last = buckets[-1]
        if last and lengths[row] > lengths[last[-1]] and len(last) * lengths[last[-1]] >= size:
            buckets.append([])
        buckets[-1].append(row)
    return [sorted(bucket) for bucket in buckets]


def each_length(
    read: Callable[[Tensor, Tensor | None, Tensor], Any],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    ends: Tensor,
) -> tuple[list[Any], Tensor]:
    """Read texts `(B, N)` in buckets of like length, without what follows the ends of those in a bucket.

    Args:
        read: ids, mask and ends of some texts -> anything.
        input_ids: token ids.
        attention_mask: `(B, N)` or None.
        ends: `(B,)`, the position of each text's last token.

    Returns:
        What `read` returned for each bucket, and the order that puts the rows of all of these in the order of texts.
    """
    lengths, found = (ends + 1).tolist(), []
    buckets = length_buckets(lengths, bucket_size(ends.device))
    for bucket in buckets:
        rows, stop = torch.tensor(bucket, device=ends.device), max(lengths[row] for row in bucket)
        mask = None if attention_mask is None else attention_mask[rows, :stop]
        found.append(read(input_ids[rows, :stop], mask, ends[rows]))
    return found, torch.tensor([row for bucket in buckets for row in bucket], device=ends.device).argsort()


def in_order(output: Any, order: Tensor) -> Any:
    """Put the rows of an output in an order."""
    return type(output)(**{name: rows[order] for name, rows in output.items()})


def prefix_tree(input_ids: Tensor, attention_mask: Tensor | None, ends: Tensor) -> PrefixTree | None:
    """Return the distinct tokens of texts `(B, N)` that end at `ends`, `(B,)`; None where they are too many to be
    worth more than rows of texts, or where padding is before tokens."""
    if input_ids.numel() < bucket_size(ends.device) // 4:
        return None
    after = torch.arange(input_ids.shape[1], device=ends.device) > ends.unsqueeze(-1)
    if attention_mask is not None and not (attention_mask.bool() | after).all():
        return None
    tree = PrefixTree(input_ids.masked_fill(after, -1))
    return tree if tree.first.numel() <= MOST_NODES * input_ids.numel() else None


def without_padding(attention_mask: Tensor | None, *rows: Tensor | None) -> tuple[Any, ...]:
    """Cut columns that are padding in every row, at both ends of the mask and of what else has a column for each
    token, `(B, N)`."""
    if attention_mask is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return attention_mask, *rows
    columns = attention_mask.any(dim=0).nonzero()
    start, stop = (0, None) if not columns.numel() else (int(columns[0]), int(columns[-1]) + 1)
    return tuple(None if each is None else each[:, start:stop] for each in (attention_mask, *rows))


def last_seen(attention_mask: Tensor) -> Tensor:
    """Find the last token of each text by its mask `(B, N)`, 0 for padding on either side -> `(B,)`."""
    return (attention_mask.bool() * torch.arange(attention_mask.shape[1], device=attention_mask.device)).argmax(dim=1)


def without_their_padding(
    embed: Callable[..., Any], config: Any, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Embed texts `(B, N)`, whose padding changes nothing, in batches of like length.

    In `last_hidden_state` padding is zero, unless hidden states or attentions are wanted. Columns that are padding in
    each text of a batch are not computed, unless these are wanted or a graph is compiled.

    Args:
        embed: ids, mask and `kwargs` -> an output with the embeddings and, unless it has none, all tokens.
        config: of the tower.
        input_ids: token ids.
        attention_mask: `(B, N)`, 0 for padding on either side; None for no padding.
        **kwargs: of the tower's forward.
    """
    if attention_mask is None or records(config, kwargs):
        return embed(input_ids, attention_mask, **kwargs)
    length = input_ids.shape[1]

    def embed_masked(ids: Tensor, mask: Any) -> Any:
        output = embed(ids, mask, **kwargs)
        if output.last_hidden_state is not None:
            output.last_hidden_state = output.last_hidden_state.masked_fill(mask.unsqueeze(-1) == 0, 0)
        return output

    def embed_short(ids: Tensor, mask: Any, _: Tensor) -> Any:
        start = int(mask.any(dim=0).int().argmax())
        mask, ids = without_padding(mask, ids)
        output = embed_masked(ids, mask)
        if (tokens := output.last_hidden_state) is not None:
            output.last_hidden_state = F.pad(tokens, (0, 0, start, length - start - tokens.shape[1]))
        return output

    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return embed_masked(input_ids, attention_mask)

    found, order = each_length(embed_short, input_ids, attention_mask, last_seen(attention_mask))
    return found[0] if len(found) == 1 else in_order(joined(found), order)


def mask_of_one(config: Any, x: Tensor, attention_mask: Tensor | None) -> Any:
    """Make the mask of one query for each text `(B, N, D)` over its tokens, `(B, N)` with 0 for those it must not see,
    in the form that `config`'s attention takes."""
    return create_bidirectional_mask(
        config=config, inputs_embeds=x[:, :1], attention_mask=attention_mask, encoder_hidden_states=x
    )


class TextTower(HfvlmPreTrainedModel):
    """Base of towers over token ids."""

    base_model_prefix = "text_model"
    _keys_to_ignore_on_load_unexpected = other_towers("text_model")
    input_modalities = ["text"]
    _input_embed_layer = "token"

    def drops_out(self) -> bool:
        """Return whether equal tokens of two texts differ, by chance."""
        return self.training and self.config.attention_dropout > 0


class MaskedTextTower(TextTower):
    """Base of towers in which no token attends to padding: with an `attention_mask`, it changes nothing."""

    def features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embed texts `(B, N)` as `without_their_padding` does, unless `token_type_ids` are given."""
        if kwargs.get("token_type_ids") is not None:
            return super().features(input_ids, attention_mask, **kwargs)
        return without_their_padding(super().features, self.config, input_ids, attention_mask, **kwargs)


class PreNormTextTower(TextTower):
    """Base of towers of pre-norm layers that pool one token.

    Attributes:
        projection_bias: whether the projection into the joint space has a bias.
    """

    projection_bias: ClassVar[bool] = False
    pools_one_token = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.embeddings = TokenEmbedding(config)
        self.layers = Stack(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = projection(config, bias=self.projection_bias)
        self.post_init()


class BidirectionalTextTower(PreNormTextTower):
    """Base of transformers in which every token of a text attends to all: SigLIP's, and those built like it.

    They were trained on texts padded to full length without a mask: padding is attended to like any token, and
    `attention_mask`, `(B, N)`, 0 for padding, defines no more than the side of the padding.
    """

    def pooling(self, input_ids: Tensor, attention_mask: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Return what takes the pooled token of each text, `(B, N, D)` -> `(B, D)`: by default that at the last
        position, whatever it is."""
        return partial(last_position, attention_mask=attention_mask)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, N)` token ids, padded to full length -> all tokens after the last norm, and the pooled output."""
        if not torch.compiler.is_compiling() and input_ids.shape[1] < self.config.max_position_embeddings:
            logger.warning_once(
                f"{type(self).__name__} got texts of {input_ids.shape[1]} tokens but was trained on texts padded to "
                f"{self.config.max_position_embeddings}; the embedding will be off. Tokenise with "
                "padding='max_length', as the processor does by default."
            )
        pool = self.pooling(input_ids, attention_mask)
        x = self.post_norm(self.layers(self.embeddings(input_ids, attention_mask), pool=pool, **kwargs))
        pooled = x[:, 0] if x.shape[1] == 1 else pool(x)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))


class CausalTextTower(PreNormTextTower):
    """Base of causal transformers that pool the end-of-text token: CLIP's and those built like it.

    They were trained without a padding mask: padding follows the end-of-text token, so causal attention never sees it.
    With an `attention_mask`, `(B, N)`, 0 for padding, it may come before the text as well. A subclass norms, pools and
    projects in its forward.
    """

    def ends(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Find the token of each text that is pooled, `(B, N)` -> `(B,)`; see `end_of_text`."""
        return end_of_text(input_ids, self.config.eos_token_id, attention_mask)

    def features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embed texts `(B, N)`; `last_hidden_state` is zero after a text's own end.

        Nothing after a text's end-of-text token can change its embedding, and it is not computed, unless hidden states
        or attentions are wanted.
        """
        if kwargs.get("pooled_only"):
            return super().features(input_ids, attention_mask, **kwargs)
        ends, length = self.ends(input_ids, attention_mask), input_ids.shape[1]

        def embed(ids: Tensor, mask: Tensor | None, ends: Tensor) -> BaseModelOutputWithPooling:
            output = as_features(self(ids, mask, **kwargs))
            tokens: Any = output.last_hidden_state
            after = torch.arange(tokens.shape[1], device=ends.device) > ends.unsqueeze(-1)
            tokens = tokens.masked_fill(after.unsqueeze(-1), 0)
            output.last_hidden_state = F.pad(tokens, (0, 0, 0, length - tokens.shape[1]))
            return output

        if records(self.config, kwargs) or torch.compiler.is_compiling():
            return embed(input_ids, attention_mask, ends)
        found, order = each_length(embed, input_ids, attention_mask, ends)
        return found[0] if len(found) == 1 else in_order(joined(found), order)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """Run the layers: `(B, N)` token ids -> `(B, N, D)`, before the last norm, or, with `pooled_only`, `(B, 1, D)`
        of the end-of-text tokens. What follows these cannot change them: each is computed in a batch of its length."""
        if not kwargs.get("pooled_only"):
            return self.read_rows(input_ids, attention_mask, **kwargs)
        ends = self.ends(input_ids, attention_mask)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.read_rows(input_ids, attention_mask, ends, **kwargs)
        found, order = each_length(partial(self.read_distinct, **kwargs), input_ids, attention_mask, ends)
        return torch.cat(found)[order]

    def read_distinct(self, input_ids: Tensor, attention_mask: Tensor | None, ends: Tensor, **kwargs: Any) -> Tensor:
        """Run the layers over texts `(B, N)`, of tokens at `ends`, `(B,)`; tokens after the same tokens are computed
        once where that pays: see `prefix_tree`."""
        tree = None if self.drops_out() else prefix_tree(input_ids, attention_mask, ends)
        if tree is None:
            return self.read_rows(input_ids, attention_mask, ends, **kwargs)
        x = self.embeddings(tree.ids.clamp_min(0))
        visible = torch.arange(x.shape[1], device=x.device) <= tree.ends.unsqueeze(-1)
        kwargs |= {"pool": tree.pool, "pooled_mask": mask_of_one(self.config, x, visible), "is_causal": True}
        return self.layers(tree.gather(x), causal_mask(self.config, x, None), tree=tree, **kwargs)[tree.texts]

    def read_rows(
        self, input_ids: Tensor, attention_mask: Tensor | None, ends: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Run the layers over texts `(B, N)`; as `read`, of tokens at `ends`, `(B,)`, or of all."""
        x = self.embeddings(input_ids, attention_mask)
        mask = causal_mask(self.config, x, attention_mask)
        if ends is not None:
            visible = torch.arange(x.shape[1], device=x.device) <= ends.unsqueeze(-1)
            if attention_mask is not None:
                visible = visible & attention_mask.bool()
            kwargs["pooled_mask"] = mask_of_one(self.config, x, visible)
            kwargs["pool"] = partial(tokens_at, positions=ends)
        return self.layers(x, mask, **kwargs | {"is_causal": True})

    def end_tokens(self, x: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Take the end-of-text token of each text: `(B, N, D)`, or `(B, 1, D)` of it alone -> `(B, D)`."""
        if x.shape[1] == 1:
            return x[:, 0]
        return tokens_at(x, self.ends(input_ids, attention_mask))

    def resize_positions(self, context_length: int) -> None:
        """Change the number of positions for good, as open_clip does when it loads a file."""
        self.embeddings.position = nn.Parameter(resize_line(self.embeddings.position.data, context_length))
        self.config.max_position_embeddings = context_length
