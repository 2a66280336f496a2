"""BLIP-2's first stage: queries that are compared with texts, matched with them, and captioned
(https://arxiv.org/abs/2301.12597, section 3.2)."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from transformers import AutoModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from hfvlm.losses import best_query_loss, best_query_scores, captioning_loss, late_interaction_scores
from hfvlm.losses.processes import all_processes, positives
from hfvlm.modeling.base import HfvlmPreTrainedModel, loss_without_labels
from hfvlm.modeling.captioning import CaptioningModel, TextDecoder, begin_with
from hfvlm.modeling.compat import CACHE_NAMES, causal_mask
from hfvlm.modeling.keywords import Keywords, keywords_of
from hfvlm.modeling.matching import MatchingModel, MatchingOutput
from hfvlm.models.blip2.configuration_blip2 import HfvlmBLIP2Config
from hfvlm.models.blip2.modeling_blip2 import PARTS, STAGE_2, HfvlmBLIP2QFormerModel
from hfvlm.modules.context import Context
from hfvlm.modules.language_head import BertLanguageHead
from hfvlm.modules.projection import projection
from hfvlm.modules.similarity import FixedTemperature, Temperature, cosines


@dataclass
class QueryFeatures(BaseModelOutputWithPooling):
    """The queries' output for images.

    Args:
        image_tokens: `(B, M, C)`, the vision tower's tokens, which they attend to.
    """

    image_tokens: Tensor | None = None


class HfvlmBLIP2ForImageTextRetrieval(MatchingModel):
    """Compares images and texts by the query that fits best, and matches the best candidates."""

    config: HfvlmBLIP2Config
    base_model_prefix = "blip2"
    _no_split_modules = ["PreNormLayer", "QFormerLayer"]
    _keys_to_ignore_on_load_unexpected = [*PARTS, *STAGE_2]
    towers = {"image": "qformer_model", "text": "qformer_model"}
    pair_loss = staticmethod(best_query_loss)
    max_logit_scale = 1000.0
    image_tokens_field = "image_tokens"

    def __init__(self, config: HfvlmBLIP2Config):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.qformer_model = HfvlmBLIP2QFormerModel._from_config(config.qformer_config)
        self.image_projection = projection(config.qformer_config, bias=True)
        self.text_projection = projection(config.qformer_config, bias=True)
        temperature = config.similarity_temperature
        self.logit_scale = FixedTemperature(1.0) if temperature is None else Temperature(temperature)
        self.itm_head = nn.Linear(config.qformer_config.hidden_size, 2)
        self.build_heads(config)
        self.post_init()

    def build_heads(self, config: HfvlmBLIP2Config) -> None:
        """Build what a head has next to these."""

    def get_input_embeddings(self) -> nn.Module:
        return self.qformer_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.qformer_model.set_input_embeddings(value)

    def encode_image(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> QueryFeatures:
        tokens = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state
        output = self.qformer_model(tokens, **kwargs)
        return QueryFeatures(
            last_hidden_state=output.last_hidden_state,
            pooler_output=self.image_projection(output.last_hidden_state),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            image_tokens=tokens,
        )

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        output = self.qformer_model(None, input_ids, attention_mask, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=self.text_projection(output.pooler_output),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> QueryFeatures:
        """Encode `(B, C, H, W)` -> an output whose `last_hidden_state`, `(B, Q, D)`, are the queries, and
        `pooler_output`, `(B, Q, P)`, their joint embeddings, not normalised."""
        return self.encode_image(pixel_values, **kwargs)

    @can_return_tuple
    def get_multimodal_features(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """Encode texts `(B * T, N)` together with images `(B, C, H, W)`, T consecutive texts for each.

        `pooler_output` are the queries `(B * T, Q, D)`, `last_hidden_state` the queries and then the text's tokens.
        """
        tokens = self.vision_model(pixel_values).last_hidden_state
        return self.qformer_model(tokens, input_ids, attention_mask, **kwargs)

    def similarities(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Compare `(I, Q, D)` and `(T, D)` by the query that fits best -> `(I, T)` cosines."""
        return best_query_scores(image_embeds, text_embeds)

    @staticmethod
    def score(queries: Tensor, gallery: Tensor) -> Tensor:
        """Score images `(I, Q, D)` and texts `(T, D)`, in either order, by the cosine of the query that fits best;
        images and images by the mean over the queries of one of their best match in the other."""
        if queries.ndim > gallery.ndim:
            return best_query_scores(queries, gallery)
        if queries.ndim < gallery.ndim:
            return best_query_scores(gallery, queries).t()
        return cosines(queries, gallery) if queries.ndim == 2 else late_interaction_scores(queries, gallery)

    def contrast(
        self,
        output: Any,
        pair_loss: Callable[..., Tensor] | None = None,
        group: ProcessGroup | None = None,
        **options: Any,
    ) -> Tensor:
        """Compute the loss as every contrastive model, by default with `label_smoothing`; `options` are the loss's."""
        if pair_loss is None:
            options["label_smoothing"] = self.config.label_smoothing
        return super().contrast(output, partial(pair_loss or self.pair_loss, **options), group)

    def match(self, input_ids: Tensor, attention_mask: Tensor | None, image_tokens: Tensor) -> Tensor:
        """Match texts `(B * T, N)`, T for each of B images' tokens `(B, M, C)` -> `(B * T, 2)`, the second column for
        a match: the mean over the queries."""
        return self.itm_head(self.qformer_model(image_tokens, input_ids, attention_mask).pooler_output).mean(dim=1)

    match_tokens = match

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        pair_ids: Tensor | None = None,
        *,
        return_loss: bool | None = None,
        **kwargs: Unpack[Keywords],
    ) -> MatchingOutput:
        """Compare every text with every image by the query that fits best.

        With `return_loss`, text i must belong to image i, and the loss is the contrastive one and that of matching
        each pair against a negative image and a negative text, which are drawn among the most similar ones of all
        processes.

        Args:
            input_ids: `(T, N)`, [CLS] first.
            pixel_values: `(I, C, H, W)`, normalised.
            attention_mask: `(T, N)`, 0 for padding on either side.
            pair_ids: `(T,)`, equal numbers for pairs about the same image.
            return_loss: also compute the losses of the batch.
            **kwargs: see `DualEncoder.forward`.
        """
        output = super().forward(input_ids, pixel_values, attention_mask, **kwargs)
        if return_loss:
            self.train_on(output, input_ids, attention_mask, pair_ids)
        return output

    def train_on(self, output: Any, input_ids: Tensor, attention_mask: Tensor | None, pair_ids: Tensor | None) -> None:
        """Add the losses to an output."""
        group = all_processes() if self.training else None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids, mask = (as_long_as_any(part, group) for part in (input_ids, mask))
        output.contrastive_loss = self.contrast(output, group=group, pair_ids=pair_ids)
        same = positives(ids.shape[0], pair_ids, ids.device, group)
        pairs = output.vision_model_output.image_tokens, ids, mask
        output.add_matching(self.match_negatives(output, pairs, same, group))


def as_long_as_any(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """Append zeros to `(B, N)` up to the length that the longest process has."""
    if group is None:
        return rows
    longest = torch.tensor(rows.shape[1], device=rows.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group)
    return F.pad(rows, (0, int(longest) - rows.shape[1]))


class QFormerDecoder(TextDecoder, HfvlmPreTrainedModel):
    """A model's Q-Former and output layer as a text decoder: words attend to all queries, and to the words before
    them."""

    _can_record_outputs = HfvlmBLIP2QFormerModel._can_record_outputs

    def __init__(self, qformer_model: HfvlmBLIP2QFormerModel, lm_head: nn.Module):
        super().__init__(qformer_model.config)
        self.qformer_model, self.lm_head, self.training = qformer_model, lm_head, qformer_model.training

    def embed_ids(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.qformer_model.embeddings(0, input_ids, position_ids)

    def mask(self, x: Tensor, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Any:
        """Make the mask over queries and words; one of `(B * T, 1, N, length)`, of a cache of fixed length, is over
        words already."""
        queries = self.config.num_queries
        if attention_mask is not None and attention_mask.ndim == 4:
            return F.pad(attention_mask, (queries, 0), value=attention_mask.dtype == torch.bool)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(x.shape[0], queries), attention_mask], dim=1)
        # The queries are in no cache; the mask is that of one which holds them, too.
        before = DynamicCache()
        held = x.new_empty(x.shape[0], 1, queries + (0 if cache is None else cache.get_seq_length()), 1)
        before.update(held, held, 0)
        return causal_mask(self.config, x, attention_mask, before)

    def decode(self, x: Tensor, mask: Any, context: Any, **kwargs: Any) -> Tensor:
        for i, layer in enumerate(self.qformer_model.layers):
            queries = context.tokens[:, i].to(x.dtype)
            x = layer(x, mask, 0, None, queries, context.kept, **kwargs | {"is_causal": True})
        return x

    def logits_of(self, x: Tensor) -> Tensor:
        return self.lm_head(x)


class HfvlmBLIP2ForPreTraining(HfvlmBLIP2ForImageTextRetrieval, CaptioningModel):
    """The paper's figure 2: queries that are compared with texts, matched with them, and captioned."""

    _tied_weights_keys = {"lm_head.decoder.weight": "qformer_model.embeddings.token.weight"}

    def build_heads(self, config: HfvlmBLIP2Config) -> None:
        qformer: Any = config.qformer_config
        self.lm_head = BertLanguageHead(qformer)

    @property
    def text_decoder(self) -> QFormerDecoder:
        return QFormerDecoder(self.qformer_model, self.lm_head)

    def further_keywords(self, method: str) -> Collection[str]:
        """Return those of a text decoder's forward, too."""
        decoding = (*keywords_of(TextDecoder), *CACHE_NAMES) if method == "forward" else ()
        return {*super().further_keywords(method), *decoding}

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: Any) -> None:
        self.lm_head.decoder = value

    @loss_without_labels
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pair_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        context: Context | None = None,
        return_loss: bool | None = None,
        **kwargs: Unpack[Keywords],
    ) -> Any:
        """Compare as `HfvlmBLIP2ForImageTextRetrieval`; the loss is also that of captioning each image.

        With `labels`, `(T, N)`, as with `return_loss`: they are the ids that captions are trained to have in their own
        positions, -100 for those that do not count; by default all but padding.

        With `context`, what `read` returned, score the next tokens of texts about images instead, as
        `TextDecoder.forward`, whose other arguments it takes then.
        """
        options: dict[str, Any] = dict(kwargs)
        if context is not None:
            return self.text_decoder(input_ids, attention_mask, context, labels=labels, **options)
        return_loss = return_loss or labels is not None
        options |= {"return_loss": True, "output_hidden_states": True} if return_loss else {}
        output = super().forward(input_ids, pixel_values, attention_mask, pair_ids, **options)
        if return_loss:
            vision: Any = output.vision_model_output
            ids, states = self.begin(input_ids, attention_mask), torch.stack(vision.hidden_states[:-1], dim=1)
            logits = self.text_decoder(ids, attention_mask, Context(states)).logits
            if labels is None:
                labels = ids if attention_mask is None else ids.masked_fill(attention_mask == 0, -100)
            smoothing = self.config.label_smoothing
            output.captioning_loss = captioning_loss(logits[:, :-1], labels[:, 1:], label_smoothing=smoothing)
            output.loss = output.loss + output.captioning_loss
        return output

    def read(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False) -> Context:  # type: ignore[override]
        """Encode images `(B, C, H, W)` -> what texts about them attend to."""
        tokens = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state
        return self.qformer_model.read(tokens)

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return begin_with(self.config.qformer_config.bos_token_id, input_ids, attention_mask)
