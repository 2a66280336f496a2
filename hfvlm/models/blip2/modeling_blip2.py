"""BLIP-2's towers and its Q-Former (https://arxiv.org/abs/2301.12597; https://github.com/salesforce/LAVIS at 506965b).

The Q-Former is one transformer for learned queries and for words. They share its attention and have MLPs of their own;
only the queries have cross-attention to the image.

With both stages, the configuration and the language models' conventions the architecture is longer than others: it is
two papers, two vision towers and three kinds of language models.
"""

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.vision import ClassTokenTower, ImageClassifier
from hfvlm.models.blip2.configuration_blip2 import (
    HfvlmBLIP2CLIPVisionConfig,
    HfvlmBLIP2Config,
    HfvlmBLIP2QFormerConfig,
    HfvlmBLIP2VisionConfig,
)
from hfvlm.modules.context import Context
from hfvlm.modules.embeddings import text_positions
from hfvlm.modules.positions import BICUBIC_SAMPLED
from hfvlm.modules.transformer import MLP, Attention, CrossAttention, MultiHead, PreNormLayer, Stack

# One folder serves several heads; each leaves unused what it has no part for.
PARTS = [r"^(vision_model|qformer_model|image_projection|text_projection|logit_scale|itm_head|lm_head)\."]
STAGE_2 = [r"^(projector|language_model)\."]


class BLIP2VisionModel(ClassTokenTower):
    """Base of both towers."""

    layers: Stack
    resize_rule = BICUBIC_SAMPLED
    _keys_to_ignore_on_load_unexpected = [*PARTS, *STAGE_2, r"^classifier\."]

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.class_token, std=std)
        init.normal_(self.position, std=std)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """Encode `(B, C, H, W)` normalised pixels -> all tokens, class token first, without a last norm.

        With `interpolate_pos_encoding`, images may have any size; the position table is resized to theirs.
        """
        x = self.embed(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        x = self.layers(x, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x[:, 0])


class KeysWithoutBias(Attention):
    """EVA's attention: queries and values have biases, keys have none."""

    def __init__(self, config: HfvlmBLIP2VisionConfig):
        super().__init__(config)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)


class HfvlmBLIP2VisionModel(BLIP2VisionModel):
    """EVA-CLIP's vision transformer (https://arxiv.org/abs/2211.07636) up to the last layer but one."""

    config: HfvlmBLIP2VisionConfig

    def __init__(self, config: HfvlmBLIP2VisionConfig):
        super().__init__(config)
        depth = config.num_hidden_layers
        self.layers = Stack(
            PreNormLayer(config, config.drop_path_rate * i / max(depth - 1, 1), KeysWithoutBias(config))
            for i in range(depth)
        )
        self.post_init()


class HfvlmBLIP2CLIPVisionModel(BLIP2VisionModel):
    """CLIP's vision transformer up to the last layer but one."""

    config: HfvlmBLIP2CLIPVisionConfig
    patch_bias = False

    def __init__(self, config: HfvlmBLIP2CLIPVisionConfig):
        super().__init__(config)
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = Stack(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def embed(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False) -> Tensor:
        return self.pre_norm(super().embed(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding))


class QFormerEmbedding(nn.Module):
    """Learned queries, without positions, followed by the words of a text, with theirs."""

    def __init__(self, config: HfvlmBLIP2QFormerConfig):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(config.num_queries, config.hidden_size))
        if config.vocab_size is not None:
            self.token = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
            self.position = nn.Parameter(torch.zeros(config.max_position_embeddings, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.queries, std=std)
        if hasattr(self, "position"):
            init.normal_(self.position, std=std)

    def forward(self, rows: int, input_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Embed the queries of `rows` images and the words `(B, N)` of texts, if there are any -> `(B, Q + N, D)`."""
        parts = [self.queries.expand(rows, -1, -1)] if rows else []
        if input_ids is not None:
            parts.append(self.token(input_ids) + self.position[position_ids])
        return self.dropout(self.norm(torch.cat(parts, dim=1)))


class QFormerAttention(MultiHead):
    """Attention of queries and words to each other, and of words to those before them."""

    def __init__(self, config: HfvlmBLIP2QFormerConfig, layer_idx: int):
        super().__init__(config)
        self.layer_idx = layer_idx

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        before: Tensor | None = None,
        kept: dict[int, tuple[Tensor, Tensor]] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: `(B * T, N, D)` -> the same, with weights where the implementation has them.

        Args:
            x: of T consecutive texts for each image.
            mask: over `before`, what is in the cache, and `x`.
            before: `(B, Q, D)`, queries before the texts.
            kept: their keys and values by layer, cached from the first call on; None caches none.
            cache: keys and values of the words between.
        """
        key, value = self.read(x)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if before is not None:
            first = self.read_once(before, kept)
            key, value = (
                torch.cat([part.repeat_interleave(x.shape[0] // before.shape[0], dim=0), own], dim=2)
                for part, own in zip(first, (key, value), strict=True)
            )
        return self.attend(x, key, value, mask, **kwargs)

    def read_once(self, before: Tensor, kept: dict[int, tuple[Tensor, Tensor]] | None) -> tuple[Tensor, Tensor]:
        if kept is None:
            return self.read(before)
        if self.layer_idx not in kept:
            kept[self.layer_idx] = self.read(before)
        return kept[self.layer_idx]


class QFormerLayer(GradientCheckpointingLayer):
    """norm(x + f(x)) for attention, in some layers of queries to the image, and an MLP for queries or for words."""

    def __init__(self, config: HfvlmBLIP2QFormerConfig, layer_idx: int):
        super().__init__()

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

        self.attention, self.attention_norm = QFormerAttention(config, layer_idx), norm()
        self.crosses = layer_idx % config.cross_attention_frequency == 0
        if self.crosses:
            self.cross_attention = CrossAttention(config, layer_idx, config.context_size)
            self.cross_attention_norm = norm()
        self.query_mlp, self.query_mlp_norm = MLP(config), norm()
        if config.vocab_size is not None:
            self.mlp, self.mlp_norm = MLP(config), norm()
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        queries: int = 0,
        context: Tensor | None = None,
        before: Tensor | None = None,
        kept: dict[int, tuple[Tensor, Tensor]] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the layer over `(B * T, N, D)`, whose first `queries` are such and attend to `context`, `(B, M, C)`."""
        x = self.attention_norm(x + self.dropout(self.attention(x, mask, before, kept, **kwargs)[0]))
        parts = []
        if queries:
            own = x[:, :queries]
            if self.crosses:
                own = self.cross_attention_norm(own + self.dropout(self.cross_attention(own, context)[0]))
            parts.append(self.query_mlp_norm(own + self.dropout(self.query_mlp(own))))
        if x.shape[1] > queries:
            words = x[:, queries:]
            parts.append(self.mlp_norm(words + self.dropout(self.mlp(words))))
        return torch.cat(parts, dim=1)


class HfvlmBLIP2QFormerModel(HfvlmPreTrainedModel):
    """The querying transformer: it encodes images, texts, texts together with images, and captions images."""

    config: HfvlmBLIP2QFormerConfig
    base_model_prefix = "qformer_model"
    main_input_name = "image_tokens"
    _keys_to_ignore_on_load_unexpected = [*PARTS, *STAGE_2]
    _no_split_modules = ["QFormerLayer"]
    _can_record_outputs = {
        "hidden_states": QFormerLayer,
        "attentions": OutputRecorder(QFormerAttention, index=1, layer_name=".attention"),
        "cross_attentions": OutputRecorder(CrossAttention, index=1, layer_name=".cross_attention"),
    }

    def __init__(self, config: HfvlmBLIP2QFormerConfig):
        super().__init__(config)
        self.context_norm = nn.LayerNorm(config.context_size, eps=config.context_norm_eps)
        self.embeddings = QFormerEmbedding(config)
        self.layers = Stack(QFormerLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.token if self.config.vocab_size is not None else self.context_norm

    def set_input_embeddings(self, value: Any) -> None:
        self.embeddings.token = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        image_tokens: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> BaseModelOutputWithPooling:
        """Encode images, texts, or both together.

        Args:
            image_tokens: `(B, M, C)`, of a vision tower; without them, there are no queries.
            input_ids: `(B * T, N)`, [CLS] first, T consecutive texts for each image.
            attention_mask: `(B * T, N)`, 0 for padding on either side.

        Returns:
            `last_hidden_state` `(B * T, Q + N, D)`, the queries first; `pooler_output`, of images the queries
            `(B, Q, D)`, of only a text its first token `(B, D)`.
        """
        if input_ids is not None and self.config.vocab_size is None:
            raise ValueError("This Q-Former takes no texts: its config.vocab_size is None.")
        if input_ids is None and attention_mask is not None:
            raise ValueError("attention_mask is that of texts, and there are no input_ids.")
        context = None if image_tokens is None else self.context_norm(image_tokens.to(self.context_norm.weight.dtype))
        queries = 0 if context is None else self.config.num_queries
        positions, rows = None, 0 if context is None else context.shape[0]
        if input_ids is not None:
            positions = text_positions(input_ids, attention_mask, self.config.max_position_embeddings)
            rows = input_ids.shape[0] if queries else 0
        x = self.embeddings(rows, input_ids, positions)
        mask = None
        if attention_mask is not None:
            whole = torch.cat([attention_mask.new_ones(x.shape[0], queries), attention_mask], dim=1)
            mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=whole)
        for layer in self.layers:
            x = layer(x, mask, queries, context, **kwargs)
        if queries:
            return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x[:, :queries])
        first = torch.zeros_like(x[:, 0, 0], dtype=torch.long)
        if attention_mask is not None:
            first = attention_mask.argmax(dim=1)
        return BaseModelOutputWithPooling(
            last_hidden_state=x, pooler_output=x.gather(1, first.view(-1, 1, 1).expand(-1, 1, x.shape[-1]))[:, 0]
        )

    def read(self, image_tokens: Tensor) -> Context:
        """Encode `(B, M, C)` -> what generated texts attend to: the queries before each layer, `(B, layers, Q, D)`."""
        states = self(image_tokens, output_hidden_states=True).hidden_states
        return Context(torch.stack(states[:-1], dim=1))


class HfvlmBLIP2ForImageClassification(ImageClassifier):
    """A linear layer on the vision tower's class token; the Q-Former is not built."""

    config: HfvlmBLIP2Config
    base_model_prefix = "blip2"
