"""BLIP for sentences about two pictures (https://arxiv.org/abs/2201.12086, figure 5b).

Source: https://github.com/salesforce/BLIP at 056a169, models/blip_nlvr.py and models/nlvr_encoder.py.
"""

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from hfvlm.keywords import Keywords
from hfvlm.modeling import HfvlmPreTrainedModel
from hfvlm.models.blip.configuration_blip import HfvlmBLIPConfig, HfvlmBLIPTextConfig
from hfvlm.models.blip.modeling_blip import PARTS, HfvlmBLIPTextModel, HfvlmBLIPVisionModel
from hfvlm.modules.context import Context
from hfvlm.modules.transformer import CrossAttention


class PairReader(nn.Module):
    """Cross-attention to two pictures, whose tokens follow each other, each with projections of its own."""

    def __init__(self, config: HfvlmBLIPTextConfig, layer_idx: int):
        super().__init__()
        self.first = CrossAttention(config, layer_idx, config.context_size)
        self.second = CrossAttention(config, layer_idx, config.context_size)

    def forward(self, x: Tensor, context: Tensor, *_: Any) -> tuple[Tensor, None]:
        """(B, N, D), (B, 2 * M, C) -> (B, N, D)."""
        first, second = context.chunk(2, dim=1)
        return self.merge(self.first(x, first)[0], self.second(x, second)[0]), None

    def merge(self, first: Tensor, second: Tensor) -> Tensor:
        return (first + second) / 2


class MergingPairReader(PairReader):
    """The same, with a linear layer where the other takes the mean."""

    def __init__(self, config: HfvlmBLIPTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.merge_layer = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def merge(self, first: Tensor, second: Tensor) -> Tensor:
        return self.merge_layer(torch.cat([first, second], dim=-1))


class PairTextModel(HfvlmBLIPTextModel):
    """The image-grounded text encoder for two pictures: the first six layers average what they see in them, the
    others learn how to merge it (paper, section 5.4)."""

    @staticmethod
    def cross_attention(config: HfvlmBLIPTextConfig, layer: int) -> nn.Module:
        return PairReader(config, layer) if layer < 6 else MergingPairReader(config, layer)


class HfvlmBLIPForVisualReasoning(HfvlmPreTrainedModel):
    """Tells whether a sentence about two pictures is true (NLVR2)."""

    config: HfvlmBLIPConfig
    pictures_per_text = 2
    base_model_prefix = "blip"
    input_modalities = ["image", "text"]
    _no_split_modules = ["PreNormLayer", "GroundedLayer"]
    _keys_to_ignore_on_load_unexpected = PARTS

    def __init__(self, config: HfvlmBLIPConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_model = HfvlmBLIPVisionModel._from_config(config.vision_config)
        self.text_model = PairTextModel._from_config(config.text_config)
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[Keywords],
    ) -> SequenceClassifierOutput:
        """Two pictures and a sentence -> logits `(B, 2)`, the second for "true".

        Args:
            pixel_values: `(B, 2, C, H, W)`, normalised.
            input_ids: `(B, N)`; [ENC] takes the place of their first token.
            attention_mask: `(B, N)`, 0 for padding on either side.
            labels: `(B,)`, 1 for true sentences.
            interpolate_pos_encoding: take pictures of any size.
        """
        pictures = pixel_values.flatten(0, 1)
        tokens = self.vision_model(pictures, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state
        context = Context(tokens.unflatten(0, (-1, 2)).flatten(1, 2))
        text = self.text_model.ground(input_ids, attention_mask, context, **kwargs)
        logits = self.classifier(text.pooler_output)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=text.hidden_states, attentions=text.attentions
        )
