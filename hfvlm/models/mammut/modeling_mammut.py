"""MaMMUT (https://arxiv.org/abs/2303.16839; https://github.com/LAION-AI/open_clip_mammut at ed2d1f6).

One text decoder in two passes. The contrastive pass embeds a text alone, in both directions, and its mean token meets
the image in the joint space; the generative pass is causal and attends to the image.
"""

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.losses import PAIR_LOSSES
from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.contrastive_captioning import CaptioningTextTower, ContrastiveCaptioner
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.vision import ClassTokenTower, ImageClassifier
from hfvlm.models.mammut.configuration_mammut import (
    HfvlmMaMMUTConfig,
    HfvlmMaMMUTTextConfig,
    HfvlmMaMMUTVisionConfig,
)
from hfvlm.modules.context import Context
from hfvlm.modules.projection import Projection
from hfvlm.modules.similarity import LogitScale
from hfvlm.modules.transformer import CausalAttention, CrossAttention, GroundingLayer, PreNormLayer, Stack


class HfvlmMaMMUTVisionModel(ClassTokenTower):
    """A vision transformer whose pooled output is the mean of all its tokens, class token included."""

    config: HfvlmMaMMUTVisionConfig
    patch_bias = False

    def __init__(self, config: HfvlmMaMMUTVisionConfig):
        super().__init__(config)
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = Stack(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = Projection(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, C, H, W)` normalised pixels -> all tokens before any last norm, class token first, and their pooled
        output.

        With `interpolate_pos_encoding`, images may have any size; the position table is resized to it.
        """
        x = self.embed(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        x = self.layers(self.pre_norm(x), **kwargs)
        pooled = self.post_norm(x.mean(dim=1))
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))

    def positions_for(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool) -> Tensor:
        position = super().positions_for(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        if self.training and self.config.cropped_positions is not None:
            return cropped(position, self.config.grid, self.config.cropped_positions)
        return position


class AttentionLayer(PreNormLayer):
    """A layer that has no MLP."""

    def __init__(self, config: HfvlmMaMMUTTextConfig, attention: CausalAttention):
        super().__init__(config, attention=attention)
        del self.mlp_norm, self.mlp

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, **kwargs: Any) -> Tensor:
        return x + self.attend(x, mask, context, **kwargs)


LAYERS: dict[str, Any] = {"full": PreNormLayer, "attention": AttentionLayer}


class SizedTable(HfvlmPreTrainedModel):
    """A model whose table of tokens may have other rows than scores, until it is resized."""

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Give the table as many rows as there are scores; see transformers'."""
        table = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        text: Any = self.config.get_text_config(decoder=True)
        if table.weight.shape[0] == text.vocab_size:
            text.token_rows = None
        return table


class HfvlmMaMMUTTextModel(CaptioningTextTower, SizedTable):
    """The text decoder: without a context it is the contrastive pass, with one the generative."""

    config: HfvlmMaMMUTTextConfig
    _no_split_modules = ["PreNormLayer", "AttentionLayer", "GroundingLayer"]

    def __init__(self, config: HfvlmMaMMUTTextConfig):
        super().__init__(config)
        width = config.hidden_size
        self.token = nn.Embedding(config.token_rows or config.vocab_size, width)
        self.position = nn.Parameter(torch.zeros(config.max_position_embeddings, width))
        self.layers = nn.ModuleList(
            LAYERS[kind](config, attention=CausalAttention(config, i)) for i, kind in enumerate(config.layer_kinds)
        )
        self.grounding_layers = nn.ModuleList(
            GroundingLayer(config, CrossAttention(config, i)) for i in config.grounded
        )
        self.post_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.position, std=std / 2)

    def decode(self, x: Tensor, mask: Any, context: Any, **kwargs: Any) -> Tensor:
        tokens, context_mask = context.tokens.to(x.dtype), context.mask_for(x, self.config)
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, **kwargs)
            if i in self.config.grounded:
                grounding = self.grounding_layers[i // self.config.grounding_interval]
                x = grounding(x, tokens, context_mask, context.kept)
        return x

    def logits_of(self, x: Tensor) -> Tensor:
        return self.lm_head(self.post_norm(x))

    def embed(self, input_ids: Tensor, **kwargs: Any) -> TowerOutput:
        """Run the contrastive pass: `(B, N)` -> all tokens after the last norm, and their mean."""
        x = self.embed_ids(input_ids, self.positions(input_ids, None))
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=None)
        for layer in self.layers:
            x = layer(x, mask, **kwargs | {"is_causal": False})
        x = self.post_norm(x)
        pooled = x.mean(dim=1)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=pooled)


class HfvlmMaMMUTModel(ContrastiveCaptioner, SizedTable):
    """Images and texts in one space, and captions."""

    config: HfvlmMaMMUTConfig
    base_model_prefix = "mammut"
    _no_split_modules = ["PreNormLayer", "AttentionLayer", "GroundingLayer"]
    max_logit_scale = 100.0

    def __init__(self, config: HfvlmMaMMUTConfig):
        super().__init__(config)
        self.build_towers(config)
        self.projector = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size, bias=False)
        self.logit_scale = LogitScale(config.logit_scale_init_value)
        self.post_init()

    def context(self, image: BaseModelOutputWithPooling) -> Context:
        return Context(self.projector(image.last_hidden_state))

    def pair_loss(self, *pairs: Any, **options: Any) -> Tensor:
        return PAIR_LOSSES[self.config.pair_loss](*pairs, **options)


def cropped(table: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Draw the positions of a random part of a larger image (RO-ViT, https://arxiv.org/abs/2305.07011, section 3.1).

    The grid of a table `(1 + rows * columns, D)` is enlarged to `size` x `size`, and a part of it, of a tenth of its
    area at least, is resized to the grid again. One draw for a batch.
    """
    rows, columns = grid
    image = table[1:].reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    image = interpolate(image, size=(size, size), mode="bilinear", align_corners=False)
    share, ratio, y, x = torch.rand(4).tolist()
    area, aspect = 0.1 + 0.9 * share, 2 ** (2 * ratio - 1)
    height, width = (max(1, min(size, round(size * edge**0.5))) for edge in (area * aspect, area / aspect))
    top, left = round(y * (size - height)), round(x * (size - width))
    part = image[:, :, top : top + height, left : left + width]
    part = interpolate(part, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([table[:1], part.flatten(2)[0].t()])


class HfvlmMaMMUTForImageClassification(ImageClassifier):
    """A linear layer on the mean of the vision tower's tokens."""

    config: HfvlmMaMMUTConfig
    base_model_prefix = "mammut"
