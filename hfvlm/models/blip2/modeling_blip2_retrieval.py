"""BLIP-2's first stage: queries that compare, match and write (https://arxiv.org/abs/2301.12597, section 3.2)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from hfvlm.losses import best_query_loss, best_query_scores, captioning_loss, late_interaction_scores
from hfvlm.losses.best_query import partners
from hfvlm.losses.processes import GatherRows, gather_rows
from hfvlm.modeling.base import unit
from hfvlm.modeling.captioning import TextDecoder
from hfvlm.modeling.dual_encoder import DualEncoder
from hfvlm.modeling.keywords import Keywords
from hfvlm.models.blip.modeling_blip import MatchingOutput, RetrievalScores, begin_with, matching_loss, scored_twice
from hfvlm.models.blip2.configuration_blip2 import HfvlmBLIP2Config
from hfvlm.models.blip2.modeling_blip2 import PARTS, STAGE_2, HfvlmBLIP2QFormerModel
from hfvlm.modules.context import Context
from hfvlm.modules.language_head import BertLanguageHead
from hfvlm.modules.projection import projection
from hfvlm.modules.similarity import FixedTemperature, Temperature, cosines


@dataclass
class PictureFeatures(BaseModelOutputWithPooling):
    """What the queries made of pictures.

    Args:
        image_tokens: `(B, M, C)`, what they looked at.
    """

    image_tokens: Tensor | None = None


class HfvlmBLIP2ForImageTextRetrieval(DualEncoder):
    """Compares pictures and texts by the query that fits best, and looks at the best candidates together."""

    config: HfvlmBLIP2Config
    base_model_prefix = "blip2"
    _no_split_modules = ["PreNormLayer", "QFormerLayer"]
    _keys_to_ignore_on_load_unexpected = [*PARTS, *STAGE_2]
    towers = {"image": "qformer_model", "text": "qformer_model"}
    pair_loss = staticmethod(best_query_loss)
    max_logit_scale = 1000.0

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
        """What a head has beside these."""

    def get_input_embeddings(self) -> nn.Module:
        return self.qformer_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.qformer_model.set_input_embeddings(value)

    def encode_image(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> PictureFeatures:
        tokens = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state
        output = self.qformer_model(tokens, **kwargs)
        return PictureFeatures(
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
    def get_image_features(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> PictureFeatures:
        """`(B, C, H, W)` -> an output whose `last_hidden_state`, `(B, Q, D)`, are the queries, and `pooler_output`,
        `(B, Q, P)`, their joint embeddings, not normalised."""
        return self.encode_image(pixel_values, **kwargs)

    @can_return_tuple
    def get_multimodal_features(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """Texts `(B * T, N)` read together with pictures `(B, C, H, W)`, T consecutive texts with each.

        `pooler_output` are the queries `(B * T, Q, D)`, `last_hidden_state` the text's tokens behind them, too.
        """
        tokens = self.vision_model(pixel_values).last_hidden_state
        return self.qformer_model(tokens, input_ids, attention_mask, **kwargs)

    @staticmethod
    def score(queries: Tensor, gallery: Tensor) -> Tensor:
        """Pictures `(I, Q, D)` and texts `(T, D)`, in either order -> the cosine of the query that fits best; of
        pictures with pictures, the mean over the queries of one of their best match in the other."""
        if queries.ndim > gallery.ndim:
            return best_query_scores(queries, gallery)
        if queries.ndim < gallery.ndim:
            return best_query_scores(gallery, queries).t()
        return cosines(queries, gallery) if queries.ndim == 2 else late_interaction_scores(queries, gallery)

    def compare(
        self, image: BaseModelOutputWithPooling, text: BaseModelOutputWithPooling, *, return_loss: bool | None
    ) -> MatchingOutput:
        image_embeds, text_embeds = unit(image.pooler_output), unit(text.pooler_output)
        logits = self.logit_scale(best_query_scores(image_embeds, text_embeds))
        output = MatchingOutput(
            logits_per_image=logits,
            logits_per_text=logits.t(),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=image,
            logit_scale=self.logit_scale.exp(),
        )
        if return_loss:
            output.loss = self.contrast(output)
        return output

    def contrast(
        self,
        output: Any,
        pair_loss: Callable[..., Tensor] | None = None,
        group: ProcessGroup | None = None,
        **options: Any,
    ) -> Tensor:
        if pair_loss is None:
            options["label_smoothing"] = self.config.label_smoothing
        loss = pair_loss or self.pair_loss
        return loss(output.image_embeds, output.text_embeds, output.logit_scale, None, group=group, **options)

    def match(self, input_ids: Tensor, attention_mask: Tensor | None, image_tokens: Tensor) -> Tensor:
        """`(B * T, N)` texts, T for each of B pictures' tokens `(B, M, C)` -> `(B * T, 2)`, the second column for a
        match: the mean of what each query says."""
        return self.itm_head(self.qformer_model(image_tokens, input_ids, attention_mask).pooler_output).mean(dim=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        pair_ids: Tensor | None = None,
        *,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[Keywords],
    ) -> MatchingOutput:
        """Every text against every picture by the query that fits best.

        With `return_loss`, text i must belong to picture i, and the loss is the contrastive one and that of matching
        each pair against a wrong picture and a wrong text, which are drawn among the most similar ones of all
        processes.

        Args:
            input_ids: `(T, N)`, [CLS] first.
            pixel_values: `(I, C, H, W)`, normalised.
            attention_mask: `(T, N)`, 0 for padding on either side.
            pair_ids: `(T,)`, equal numbers for pairs about the same picture.
            return_loss: also compute the losses of the batch.
            interpolate_pos_encoding: take pictures of any size.
        """
        image = self.encode_image(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        text = self.encode_text(input_ids, attention_mask)
        output = self.compare(image, text, return_loss=False)
        if return_loss:
            self.train_on(output, input_ids, attention_mask, pair_ids)
        return output

    def train_on(
        self, output: MatchingOutput, input_ids: Tensor, attention_mask: Tensor | None, pair_ids: Tensor | None
    ) -> None:
        """Add the losses to an output."""
        tokens = output.vision_model_output.image_tokens  # type: ignore[union-attr]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids, mask = (as_long_as_any(part, self.group) for part in (input_ids, mask))
        output.contrastive_loss = self.contrast(output, group=self.group, pair_ids=pair_ids)
        wrong_images, wrong_texts = self.hard_negatives(output, pair_ids)
        output.matching_logits = self.match(
            torch.cat([ids, ids, gather_rows(ids, self.group)[wrong_texts]]),
            torch.cat([mask, mask, gather_rows(mask, self.group)[wrong_texts]]),
            torch.cat([tokens, GatherRows.apply(tokens, self.group)[wrong_images], tokens]),
        )
        output.matching_loss = matching_loss(output.matching_logits)
        output.loss = output.contrastive_loss + output.matching_loss

    @property
    def group(self) -> ProcessGroup | None:
        """All processes, in training on several."""
        return dist.group.WORLD if self.training and dist.is_available() and dist.is_initialized() else None

    @torch.no_grad()
    def hard_negatives(self, output: Any, pair_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """A wrong picture for each text and a wrong text for each picture among those of all processes, the more
        similar the likelier."""
        own_images, own_texts, scale = output.image_embeds, output.text_embeds, output.logit_scale
        images, texts = (gather_rows(embeds, self.group) for embeds in (own_images, own_texts))
        same = partners(own_texts.shape[0], pair_ids, own_texts.device, self.group)
        if bool(same.all(dim=1).any()):
            raise ValueError("Matching needs a wrong partner for each pair: give batches of at least two pairs.")
        per_text, per_image = (
            best_query_scores(images, own_texts).t() * scale,
            best_query_scores(own_images, texts) * scale,
        )
        images = self.draw(per_text.masked_fill(same, -10000).softmax(dim=1))
        return images, self.draw(per_image.masked_fill(same, -10000).softmax(dim=1))

    def draw(self, weights: Tensor) -> Tensor:
        """`(B, all)` -> `(B,)`, a column of each row."""
        return torch.multinomial(weights, 1).squeeze(1)

    @torch.no_grad()
    def rerank(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, *, top_k: int = 128
    ) -> RetrievalScores:
        """Two-stage retrieval: the `top_k` by the best query's cosine are scored by it plus the logit of a match.

        Args:
            pixel_values: `(I, C, H, W)`, normalised.
            input_ids: `(T, N)`.
            attention_mask: `(T, N)`, 0 for padding.
            top_k: how many candidates the second stage looks at; the paper takes 128.
        """
        image, text = self.encode_image(pixel_values), self.encode_text(input_ids, attention_mask)
        cosines = best_query_scores(unit(image.pooler_output), unit(text.pooler_output))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        tokens: Any = image.image_tokens

        def match(images: Tensor, texts: Tensor) -> Tensor:
            return self.match(input_ids[texts], mask[texts], tokens[images])

        return scored_twice(cosines, match, top_k)


def as_long_as_any(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """`(B, N)` -> the same, with zeros behind it up to the length that the longest process has."""
    if group is None:
        return rows
    longest = torch.tensor(rows.shape[1], device=rows.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group)
    return F.pad(rows, (0, int(longest) - rows.shape[1]))


class HfvlmBLIP2ForPreTraining(HfvlmBLIP2ForImageTextRetrieval, TextDecoder):
    """The paper's figure 2: queries that are compared with texts, matched with them, and written about."""

    _tied_weights_keys = {"lm_head.decoder.weight": "qformer_model.embeddings.token.weight"}

    def build_heads(self, config: HfvlmBLIP2Config) -> None:
        qformer: Any = config.qformer_config
        self.lm_head = BertLanguageHead(qformer)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: Any) -> None:
        self.lm_head.decoder = value

    @can_return_tuple
    def forward(  # noqa: PLR0913 (two passes: of pairs, and of texts that are continued)
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pair_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        *,
        context: Context | None = None,
        return_loss: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[Keywords],
    ) -> Any:
        """Compare as `HfvlmBLIP2ForImageTextRetrieval`; the loss is also that of captioning each image.

        With `context`, what `read` returned, score the next tokens of texts about images instead: `position_ids`,
        `cache`, `use_cache` and `logits_to_keep` are as in `TextDecoder.forward`.
        """
        if context is not None:
            return self.step(
                input_ids,
                attention_mask,
                context,
                position_ids,
                cache,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        if not return_loss:
            return super().forward(input_ids, pixel_values, attention_mask, **kwargs)
        output = super().forward(
            input_ids, pixel_values, attention_mask, pair_ids, return_loss=True, output_hidden_states=True, **kwargs
        )
        seen: Any = output.vision_model_output
        ids = begin_with(self.config.qformer_config.bos_token_id, input_ids, attention_mask)
        logits: Any = self.step(ids, attention_mask, Context(torch.stack(seen.hidden_states[:-1], dim=1))).logits
        labels = ids if attention_mask is None else ids.masked_fill(attention_mask == 0, -100)
        smoothing = self.config.label_smoothing
        output.captioning_loss = captioning_loss(logits[:, :-1], labels[:, 1:], label_smoothing=smoothing)
        output.loss = output.loss + output.captioning_loss
        return output

    def read(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False) -> Context:
        """`(B, C, H, W)` -> what texts are written about."""
        tokens = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state
        return self.qformer_model.read(tokens)

    def decode(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None,
        context: Any,
        cache: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        return self.qformer_model.decode(input_ids, positions, attention_mask, context, cache, **kwargs)

    def logits_of(self, x: Tensor) -> Tensor:
        return self.lm_head(x)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        pixel_values: Any = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        context: Context | None = None,
        interpolate_pos_encoding: bool = False,
        **options: Any,
    ) -> Any:
        """Write about pictures, each of which is read once, however many texts and beams there are about it.

        Args:
            pixel_values: `(B, C, H, W)`, normalised.
            input_ids: `(B * T, N)`, T texts to continue for each picture; by default only [DEC]. The end token that
                a tokenizer puts after them is taken off.
            attention_mask: `(B * T, N)`, 0 for padding, which may be on either side.
            context: what `read` returned, instead of pixels.
            interpolate_pos_encoding: take pictures of any size.
            **options: of transformers' `generate`.

        Returns:
            Token ids that begin with [DEC] and the given ones, or what `options` ask for.
        """
        if context is None:
            context = self.read(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        if input_ids is not None:
            config = self.config.qformer_config
            input_ids = begin_with(config.bos_token_id, input_ids, attention_mask)
            whole = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            attention_mask = whole * (input_ids != config.eos_token_id)
        return super().generate(input_ids, context=context, attention_mask=attention_mask, **options)
