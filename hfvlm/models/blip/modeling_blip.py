"""BLIP's towers and dual encoder (https://arxiv.org/abs/2201.12086; https://github.com/salesforce/BLIP at 056a169).

The paper's mixture of encoder and decoder is one layer with three uses: without an image it encodes a text, with one
it encodes the text with cross-attention to the image, and with causal attention it captions the image.

Each task's head has a module of its own; together with their configuration they are longer than other architectures
because the original has seven models: features, captioning, retrieval, question answering, visual reasoning, and two
kinds of training with momentum encoders.
"""

from typing import Any, Unpack

from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hfvlm.losses import contrastive_loss
from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.captioning import TextDecoder, begin_with
from hfvlm.modeling.dual_encoder import DualEncoder
from hfvlm.modeling.generation import WholeTextBeams
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.vision import ClassTokenTower, ImageClassifier
from hfvlm.models.blip.configuration_blip import HfvlmBLIPConfig, HfvlmBLIPTextConfig, HfvlmBLIPVisionConfig
from hfvlm.modules.context import Context
from hfvlm.modules.embeddings import BertEmbedding, text_positions
from hfvlm.modules.language_head import BertLanguageHead
from hfvlm.modules.pooling import first_token
from hfvlm.modules.positions import BICUBIC_SAMPLED
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

# One folder serves several heads; each leaves unused what it has no part for.
PARTS = [r"^(vision_model|text_model|text_decoder|teacher|itm_head|classifier|logit_scale)\."]


class HfvlmBLIPPreTrainedModel(HfvlmPreTrainedModel):
    """Base of the towers and of their compositions."""

    config: Any
    base_model_prefix = "blip"
    _no_split_modules = ["PreNormLayer", "GroundedLayer"]
    _keys_to_ignore_on_load_unexpected = PARTS


class HfvlmBLIPVisionModel(ClassTokenTower, HfvlmBLIPPreTrainedModel):
    """A vision transformer."""

    config: HfvlmBLIPVisionConfig
    pools_one_token = True
    resize_rule = BICUBIC_SAMPLED
    _keys_to_ignore_on_load_unexpected = PARTS
    _no_split_modules = ["PreNormLayer"]

    def __init__(self, config: HfvlmBLIPVisionConfig):
        super().__init__(config)
        depth = config.num_hidden_layers
        self.layers = Stack(PreNormLayer(config, config.drop_path_rate * i / max(depth - 1, 1)) for i in range(depth))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = projection(config, bias=True)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.class_token, std=std)
        init.normal_(self.position, std=std)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """Encode `(B, C, H, W)` normalised pixels -> all tokens after the last norm, and the class token, the first.

        With `interpolate_pos_encoding`, images may have any size; the position table is resized to theirs.
        """
        x = self.embed(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        x = self.post_norm(self.layers(x, **kwargs))
        return TowerOutput(last_hidden_state=x, pooler_output=x[:, 0], embeds=self.projection(x[:, 0]))


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
            attended = self.cross_attention(x, context, context_mask, kept)[0]
            x = self.cross_attention_norm(x + self.dropout(attended))
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


class HfvlmBLIPTextPreTrainedModel(HfvlmBLIPPreTrainedModel):
    """Base of the text towers."""

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
        """Encode `(B * T, N)` token ids, [CLS] first -> all tokens, and the first of them as pooled output.

        Args:
            input_ids: unchanged; `ground` puts [ENC] where a text begins.
            attention_mask: `(B * T, N)`, 0 for padding on either side.
            context: of B rows, T consecutive texts for each; without one the cross-attention is left out.
        """
        positions = text_positions(input_ids, attention_mask, self.config.max_position_embeddings)
        x = self.embeddings(input_ids, positions)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        x = self.layers(x, mask, context, **kwargs)
        pooled = first_token(x, attention_mask)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))

    def ground(self, input_ids: Tensor, attention_mask: Tensor | None, context: Context, **kwargs: Any) -> TowerOutput:
        """Encode texts with cross-attention to a context: [ENC] takes the place of [CLS]."""
        ids = begin_with(self.config.encoder_token_id, input_ids, attention_mask)
        return self(ids, attention_mask, context, **kwargs)


class HfvlmBLIPTextDecoder(WholeTextBeams, TextDecoder, HfvlmBLIPTextPreTrainedModel):
    """The image-grounded text decoder: texts begin with [DEC]. The authors' beams are those of transformers 4.15."""

    base_model_prefix = "text_decoder"
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

    def embed_ids(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.embeddings(input_ids, position_ids)

    def decode(self, x: Tensor, mask: Any, context: Any, **kwargs: Any) -> Tensor:
        return self.layers(x, mask, context, **kwargs)

    def logits_of(self, x: Tensor) -> Tensor:
        return self.lm_head(x)


class HfvlmBLIPModel(DualEncoder, HfvlmBLIPPreTrainedModel):
    """Images and texts in one space, and texts with cross-attention to images."""

    config: HfvlmBLIPConfig
    pair_loss = staticmethod(contrastive_loss)
    max_logit_scale = 1000.0
    ignores_padding = True

    def __init__(self, config: HfvlmBLIPConfig):
        super().__init__(config)
        self.vision_model = HfvlmBLIPVisionModel._from_config(config.vision_config)
        self.text_model = HfvlmBLIPTextModel._from_config(config.text_config)
        temperature = config.similarity_temperature
        self.logit_scale = FixedTemperature(1.0) if temperature is None else Temperature(temperature)
        self.build_heads(config)
        self.post_init()

    def build_heads(self, config: HfvlmBLIPConfig) -> None:
        """Build what a head has next to the two towers."""

    @can_return_tuple
    def get_multimodal_features(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """Encode texts `(B * T, N)` with cross-attention to images `(B, C, H, W)`, T consecutive texts for each.

        `last_hidden_state` are the texts' tokens, `pooler_output` the first of them, which a matching head classifies.
        """
        context = Context(self.vision_model(pixel_values).last_hidden_state)
        output = self.text_model.ground(input_ids, attention_mask, context, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=output.pooler_output,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class HfvlmBLIPForImageClassification(ImageClassifier):
    """A linear layer on the vision tower's class token."""

    config: HfvlmBLIPConfig
    base_model_prefix = "blip"
