"""BLIP (https://arxiv.org/abs/2201.12086; https://github.com/salesforce/BLIP at 056a169).

The paper's mixture of encoder and decoder is one layer with three uses: without a picture it reads a text, with one it
reads the text together with the picture, and with causal attention it writes about the picture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hfvlm.checks.ranges import check_integer
from hfvlm.losses import captioning_loss, contrastive_loss
from hfvlm.modeling.base import HfvlmPreTrainedModel, unit
from hfvlm.modeling.captioning import CaptioningModel, CaptioningOutput, TextDecoder
from hfvlm.modeling.compat import causal_mask
from hfvlm.modeling.dual_encoder import DualEncoder
from hfvlm.modeling.generation import WholeTextBeams
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import DualEncoderOutput, TowerOutput
from hfvlm.models.blip.configuration_blip import HfvlmBLIPConfig, HfvlmBLIPTextConfig, HfvlmBLIPVisionConfig
from hfvlm.modules.context import Context
from hfvlm.modules.dropout import PatchDropout
from hfvlm.modules.embeddings import BertEmbedding, PatchEmbedding, text_positions
from hfvlm.modules.language_head import BertLanguageHead
from hfvlm.modules.positions import BICUBIC_SAMPLED, check_positions, grid_for, resize_grid
from hfvlm.modules.projection import projection
from hfvlm.modules.similarity import FixedTemperature, Temperature
from hfvlm.modules.transformer import (
    Attention,
    CausalAttention,
    CrossAttention,
    MultiHead,
    PostNormLayer,
    PreNormLayer,
    Stack,
)

# One folder serves several heads; each leaves unread what it has no part for.
PARTS = [r"^(vision_model|text_model|text_decoder|teacher|itm_head|classifier|logit_scale)\."]


class HfvlmBLIPVisionModel(HfvlmPreTrainedModel):
    """A vision transformer whose tokens are read after the last norm."""

    config: HfvlmBLIPVisionConfig
    base_model_prefix = "vision_model"
    _keys_to_ignore_on_load_unexpected = PARTS
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: HfvlmBLIPVisionConfig):
        super().__init__(config)
        rows, columns = config.grid
        depth = config.num_hidden_layers
        self.patches = PatchEmbedding(config)
        self.class_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.position = nn.Parameter(torch.zeros(1 + rows * columns, config.hidden_size))
        self.patch_dropout = PatchDropout(config.patch_dropout, prefix=1)
        self.layers = Stack(PreNormLayer(config, config.drop_path_rate * i / max(depth - 1, 1)) for i in range(depth))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = projection(config, bias=True)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.class_token, std=std)
        init.normal_(self.position, std=std)

    def get_input_embeddings(self) -> nn.Module:
        return self.patches

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, C, H, W)` normalised pixels -> all tokens after the last norm, class token first, and the summary.

        With `interpolate_pos_encoding`, pictures may have any size; the position table is resized to it.
        """
        x = self.patches(pixel_values)
        x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)
        position: Tensor = self.position
        if interpolate_pos_encoding:
            position = grid_for(position, self.config, pixel_values, **BICUBIC_SAMPLED)
        check_positions(x, position, pixel_values, self.config.image_size)
        x = self.post_norm(self.layers(self.patch_dropout(x + position), **kwargs))
        return TowerOutput(last_hidden_state=x, pooler_output=x[:, 0], embeds=self.projection(x[:, 0]))

    def resize_positions(self, image_size: int | tuple[int, int]) -> None:
        """Change the picture size for good, as the original does when it loads a file that was trained at another."""
        old, self.config.image_size = self.config.grid, image_size
        self.position = nn.Parameter(resize_grid(self.position.data, old, self.config.grid, **BICUBIC_SAMPLED))


class GroundedLayer(PostNormLayer):
    """BERT's layer with attention to a context, where there is one, between its attention and its MLP."""

    def __init__(self, config: HfvlmBLIPTextConfig, attention: MultiHead, cross_attention: nn.Module):
        super().__init__(config, attention)
        self.cross_attention = cross_attention
        self.cross_attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        kept: dict[int, tuple[Tensor, Tensor]] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask, **kwargs)[0]))
        if context is not None:
            seen = self.cross_attention(x, context, context_mask, kept)[0]
            x = self.cross_attention_norm(x + self.dropout(seen))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class GroundedStack(Stack):
    """Grounded layers, one after the other."""

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Context | None = None, **kwargs: Any) -> Tensor:
        if context is None:
            return super().forward(x, mask, **kwargs)
        first: Any = self[0]
        tokens, context_mask = context.tokens.to(x.dtype), context.mask_for(x, first.attention.config)
        for layer in self:
            x = layer(x, mask, tokens, context_mask, context.kept, **kwargs)
        return x


class HfvlmBLIPTextPreTrainedModel(HfvlmPreTrainedModel):
    """What the text towers share."""

    config: HfvlmBLIPTextConfig
    input_modalities = ["text"]
    _input_embed_layer = "token"
    _no_split_modules = ["GroundedLayer"]
    _can_record_outputs = {
        "hidden_states": GroundedLayer,
        "attentions": OutputRecorder(MultiHead, index=1, layer_name=".attention"),
        "cross_attentions": OutputRecorder(CrossAttention, index=1, layer_name=".cross_attention"),
    }


class HfvlmBLIPTextModel(HfvlmBLIPTextPreTrainedModel):
    """The text encoder and, with a context, the image-grounded text encoder."""

    base_model_prefix = "text_model"
    _keys_to_ignore_on_load_unexpected = PARTS

    def __init__(self, config: HfvlmBLIPTextConfig):
        super().__init__(config)
        self.embeddings = BertEmbedding(config)
        self.layers = GroundedStack(
            GroundedLayer(config, Attention(config), self.cross_attention(config, i))
            for i in range(config.num_hidden_layers)
        )
        self.projection = projection(config, bias=True)
        self.post_init()

    @staticmethod
    def cross_attention(config: HfvlmBLIPTextConfig, layer: int) -> nn.Module:
        return CrossAttention(config, layer, config.context_size)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        context: Context | None = None,
        **kwargs: Unpack[Keywords],
    ) -> TowerOutput:
        """`(B * T, N)` token ids, [CLS] first -> all tokens, and the first token's summary.

        Args:
            input_ids: as they are; `ground` writes [ENC] where a text begins.
            attention_mask: `(B * T, N)`, 0 for padding on either side.
            context: of B rows, T consecutive texts for each; without one the cross-attention is left out.
        """
        positions = text_positions(input_ids, attention_mask, self.config.max_position_embeddings)
        x = self.embeddings(input_ids, positions)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        x = self.layers(x, mask, context, **kwargs)
        pooled = x.gather(1, first_token(input_ids, attention_mask).unsqueeze(-1).expand(-1, -1, x.shape[-1]))[:, 0]
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))

    def ground(self, input_ids: Tensor, attention_mask: Tensor | None, context: Context, **kwargs: Any) -> TowerOutput:
        """Read texts together with what they are grounded in: [ENC] takes the place of [CLS]."""
        ids = begin_with(self.config.encoder_token_id, input_ids, attention_mask)
        return self(ids, attention_mask, context, **kwargs)


class HfvlmBLIPTextDecoder(WholeTextBeams, TextDecoder, HfvlmBLIPTextPreTrainedModel):
    """The image-grounded text decoder: texts begin with [DEC]. The authors' beams are those of transformers 4.15."""

    base_model_prefix = "text_decoder"
    _keys_to_ignore_on_load_unexpected = PARTS
    _tied_weights_keys = {"lm_head.decoder.weight": "embeddings.token.weight"}

    def __init__(self, config: HfvlmBLIPTextConfig, context_size: int | None = None):
        super().__init__(config)
        size = context_size or config.context_size
        self.embeddings = BertEmbedding(config)
        self.layers = GroundedStack(
            GroundedLayer(config, CausalAttention(config, i), CrossAttention(config, i, size))
            for i in range(config.num_hidden_layers)
        )
        self.lm_head = BertLanguageHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head.decoder = value

    def decode(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None,
        context: Context | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        x = self.embeddings(input_ids, positions)
        mask = causal_mask(self.config, x, attention_mask, cache)
        return self.layers(x, mask, context, cache=cache, **kwargs)

    def logits_of(self, x: Tensor) -> Tensor:
        return self.lm_head(x)


class HfvlmBLIPModel(DualEncoder):
    """Pictures and texts in one space, and texts read together with pictures."""

    config: HfvlmBLIPConfig
    base_model_prefix = "blip"
    _no_split_modules = ["PreNormLayer", "GroundedLayer"]
    _keys_to_ignore_on_load_unexpected = PARTS
    pair_loss = staticmethod(contrastive_loss)
    max_logit_scale = 1000.0

    def __init__(self, config: HfvlmBLIPConfig):
        super().__init__(config)
        self.vision_model = HfvlmBLIPVisionModel._from_config(config.vision_config)
        self.text_model = HfvlmBLIPTextModel._from_config(config.text_config)
        temperature = config.similarity_temperature
        self.logit_scale = FixedTemperature(1.0) if temperature is None else Temperature(temperature)
        self.build_heads(config)
        self.post_init()

    def build_heads(self, config: HfvlmBLIPConfig) -> None:
        """What a head has beside the two towers."""

    @can_return_tuple
    def get_multimodal_features(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """Texts `(B * T, N)` read together with pictures `(B, C, H, W)`, T consecutive texts with each.

        `last_hidden_state` are the texts' tokens, `pooler_output` the first token's, which says whether they match.
        """
        context = Context(self.vision_model(pixel_values).last_hidden_state)
        output = self.text_model.ground(input_ids, attention_mask, context, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=output.pooler_output,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[Keywords],
    ) -> DualEncoderOutput:
        """Every text against every picture; with `return_loss`, text i must belong to picture i.

        Args:
            input_ids: `(T, N)`, [CLS] first.
            pixel_values: `(I, C, H, W)`, normalised.
            attention_mask: `(T, N)`, 0 for padding on either side.
            return_loss: also compute the contrastive loss of the batch, without momentum towers.
            interpolate_pos_encoding: take pictures of any size.
        """
        image = self.encode_image(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        text = self.encode_text(input_ids, attention_mask, **kwargs)
        return self.compare(image, text, return_loss=return_loss)


@dataclass
class MatchingOutput(DualEncoderOutput):
    """Pictures against texts, and pairs of them looked at together.

    Args:
        contrastive_loss: scalar, with `return_loss=True`; so are the next two.
        matching_loss: whether pairs were told from hard negatives.
        captioning_loss: of texts written about their pictures, where there is a decoder.
        matching_logits: `(3 * B, 2)`, of the pairs, of the texts with wrong pictures and of the pictures with wrong
            texts; the second column is for a match.
    """

    contrastive_loss: Tensor | None = None
    matching_loss: Tensor | None = None
    captioning_loss: Tensor | None = None
    matching_logits: Tensor | None = None


@dataclass
class RetrievalScores:
    """The second stage of retrieval.

    Args:
        per_image: `(I, T)`, of every text for each picture; -100 for those that were not looked at.
        per_text: `(T, I)`, of every picture for each text, likewise.
    """

    per_image: Tensor
    per_text: Tensor


def scored_twice(cosines: Tensor, match: Callable[[Tensor, Tensor], Tensor], top_k: int) -> RetrievalScores:
    """`(I, T)` cosines of pictures and texts -> two-stage scores: of each, the `top_k` nearest of the others have the
    cosine plus the logit of a match.

    Args:
        cosines: the first stage.
        match: numbers of pictures, and of as many consecutive texts for each -> `(texts, 2)`, the second column for a
            match.
        top_k: how many the second stage looks at.

    Raises:
        ValueError: top_k is no number of candidates.
    """
    check_integer("top_k", top_k)
    per_image, per_text = torch.full_like(cosines, -100.0), torch.full_like(cosines.t(), -100.0)
    for i, row in enumerate(cosines):
        cosine, texts = row.topk(min(top_k, row.shape[0]))
        per_image[i, texts] = match(texts.new_tensor([i]), texts)[:, 1] + cosine
    for i, row in enumerate(cosines.t()):
        cosine, images = row.topk(min(top_k, row.shape[0]))
        per_text[i, images] = match(images, torch.full_like(images, i))[:, 1] + cosine
    return RetrievalScores(per_image, per_text)


class HfvlmBLIPForImageTextRetrieval(HfvlmBLIPModel):
    """Finds candidates by their embeddings, and looks at the best together with what was asked for."""

    least_weight = 0.0  # of a wrong partner in the draw of hard negatives

    def build_heads(self, config: HfvlmBLIPConfig) -> None:
        self.itm_head = nn.Linear(config.text_config.hidden_size, 2)

    def match(self, input_ids: Tensor, attention_mask: Tensor | None, context: Context, **kwargs: Any) -> Tensor:
        """`(B * T, N)` texts, T for each of a context's B pictures -> `(B * T, 2)`, the second column for a match."""
        return self.itm_head(self.text_model.ground(input_ids, attention_mask, context, **kwargs).pooler_output)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[Keywords],
    ) -> DualEncoderOutput:
        """Every text against every picture by their embeddings, as `HfvlmBLIPModel`.

        With `return_loss`, text i must belong to picture i, and the loss is the contrastive one and that of matching
        each pair against a wrong picture and a wrong text, which are drawn from the batch among the most similar.
        """
        image = self.encode_image(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        text = self.encode_text(input_ids, attention_mask, **kwargs)
        output: Any = self.compare(image, text, return_loss=False)
        if not return_loss:
            return output
        same = torch.eye(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        wrong_images, wrong_texts = self.hard_negatives(output.logits_per_text, output.logits_per_image, same)
        tokens: Any = image.last_hidden_state
        ids, mask = input_ids, attention_mask
        logits = self.match_triples(
            (tokens, ids, mask), (tokens[wrong_images], ids[wrong_texts], None if mask is None else mask[wrong_texts])
        )
        losses = {"contrastive_loss": self.contrast(output), "matching_loss": matching_loss(logits)}
        fields: dict[str, Any] = dict(output) | losses | {"loss": sum(losses.values(), start=tokens.new_zeros(()))}
        return MatchingOutput(**fields, matching_logits=logits)

    def hard_negatives(self, per_text: Tensor, per_image: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        """A wrong picture for each text and a wrong text for each picture, the more similar the likelier.

        Args:
            per_text: `(B, B')` similarities of texts and pictures.
            per_image: `(B, B')` of pictures and texts.
            same: `(B, B')`, True for what belongs together.
        """
        if bool(same.all(dim=1).any()):
            raise ValueError("Matching needs a wrong partner for each pair: give batches of at least two pairs.")
        with torch.no_grad():
            images, texts = (self.draw(self.shares(scores.float(), same)) for scores in (per_text, per_image))
        return images, texts

    def shares(self, scores: Tensor, same: Tensor) -> Tensor:
        """`(B, B')` similarities -> how likely each wrong partner is drawn, up to a factor.

        Beside a pair that is far more similar, the probabilities of all others are zero; they are computed without it
        then.
        """
        weights = (scores.softmax(dim=1) + self.least_weight).masked_fill(same, 0)
        alone = scores.masked_fill(same, -torch.inf).softmax(dim=1)
        return torch.where(weights.sum(dim=1, keepdim=True) > 1e-30, weights, alone)

    def draw(self, weights: Tensor) -> Tensor:
        """`(B, B')` -> `(B,)`, a column of each row."""
        return torch.multinomial(weights, 1).squeeze(1)

    def match_triples(self, right: tuple[Any, ...], wrong: tuple[Any, ...]) -> Tensor:
        """Picture tokens, ids and masks of pairs, and of their wrong partners -> `(3 * B, 2)`, as `MatchingOutput`."""
        (tokens, ids, mask), (wrong_tokens, wrong_ids, wrong_mask) = right, wrong
        context = Context(torch.cat([tokens, wrong_tokens, tokens]))
        masks = None if mask is None else torch.cat([mask, mask, wrong_mask])
        return self.match(torch.cat([ids, ids, wrong_ids]), masks, context)

    @torch.no_grad()
    def rerank(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, *, top_k: int = 128
    ) -> RetrievalScores:
        """Two-stage retrieval: the `top_k` by cosine are scored by the cosine plus the logit of a match.

        Args:
            pixel_values: `(I, C, H, W)`, normalised.
            input_ids: `(T, N)`.
            attention_mask: `(T, N)`, 0 for padding.
            top_k: how many candidates the second stage looks at; the paper takes 256 on COCO and 128 on Flickr30K.
        """
        image, text = self.encode_image(pixel_values), self.encode_text(input_ids, attention_mask)
        tokens: Any = image.last_hidden_state
        cosines = unit(image.pooler_output) @ unit(text.pooler_output).t()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask

        def match(images: Tensor, texts: Tensor) -> Tensor:
            return self.match(input_ids[texts], mask[texts], Context(tokens[images]))

        return scored_twice(cosines, match, top_k)


class HfvlmBLIPForConditionalGeneration(CaptioningModel):
    """Writes about pictures."""

    config: HfvlmBLIPConfig
    base_model_prefix = "blip"
    main_input_name = "pixel_values"
    _no_split_modules = ["PreNormLayer", "GroundedLayer"]
    _keys_to_ignore_on_load_unexpected = PARTS

    def __init__(self, config: HfvlmBLIPConfig):
        super().__init__(config)
        self.vision_model = HfvlmBLIPVisionModel._from_config(config.vision_config)
        self.text_decoder = HfvlmBLIPTextDecoder._from_config(config.text_config)
        self.post_init()

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return begin_with(self.config.text_config.bos_token_id, input_ids, attention_mask)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[Keywords],
    ) -> CaptioningOutput:
        """Scores of each next token of texts about pictures and, with `labels`, the loss.

        Args:
            pixel_values: `(B, C, H, W)`, normalised.
            input_ids: `(B * T, N)`, T texts about each picture; [DEC] takes the place of their first token.
            attention_mask: `(B * T, N)`, 0 for padding on either side.
            labels: `(B * T, N)`, the ids that are to be predicted in their own places, -100 for padding and a prompt.
            shift_labels: `(B * T, N)`, labels that are shifted already: those of each next token.
            interpolate_pos_encoding: take pictures of any size.
        """
        vision = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        context = Context(vision.last_hidden_state)
        decoder = self.text_decoder(self.begin(input_ids, attention_mask), attention_mask, context, **kwargs)
        output = CaptioningOutput(logits=decoder.logits, vision_model_output=vision, text_decoder_output=decoder)
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        if shift_labels is not None:
            smoothing, count = self.config.label_smoothing, kwargs.get("num_items_in_batch")
            output.loss = captioning_loss(decoder.logits, shift_labels, label_smoothing=smoothing, num_items=count)
        return output


def matching_loss(logits: Tensor) -> Tensor:
    """Of `matching_logits`: the first third are pairs, the others are not."""
    labels = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
    labels[: logits.shape[0] // 3] = 1
    return F.cross_entropy(logits.float(), labels)


def first_token(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Where each text begins, `(B, 1)`, after padding on the left."""
    if attention_mask is None:
        return torch.zeros_like(input_ids[:, :1])
    return attention_mask.argmax(dim=1, keepdim=True)


def begin_with(token_id: int, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The same texts with another first token, which says what they are for."""
    return input_ids.scatter(1, first_token(input_ids, attention_mask), token_id)
