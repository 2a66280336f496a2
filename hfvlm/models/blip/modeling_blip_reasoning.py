"""BLIP for sentences about two images (https://arxiv.org/abs/2201.12086, figure 5b).

Source: https://github.com/salesforce/BLIP at 056a169, models/blip_nlvr.py and models/nlvr_encoder.py.
"""

import copy
import re
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.keywords import Keywords
from hfvlm.models.blip.configuration_blip import HfvlmBLIPConfig, HfvlmBLIPTextConfig
from hfvlm.models.blip.modeling_blip import HfvlmBLIPPreTrainedModel, HfvlmBLIPTextModel, HfvlmBLIPVisionModel
from hfvlm.modules.context import Context
from hfvlm.modules.transformer import CrossAttention
from hfvlm.registry import find_class

# Arguments of `from_pretrained` that name files.
SOURCE = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download", "proxies")


class ImagePair(nn.Module):
    """Cross-attention to two images, whose tokens follow each other, each with projections of its own."""

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


class MergingPair(ImagePair):
    """The same, with a linear layer in place of the mean."""

    def __init__(self, config: HfvlmBLIPTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.merge_layer = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def merge(self, first: Tensor, second: Tensor) -> Tensor:
        return self.merge_layer(torch.cat([first, second], dim=-1))


class PairTextModel(HfvlmBLIPTextModel):
    """The image-grounded text encoder for two images: the first six layers average the attention to them, the others
    learn how to merge it (paper, section 5.4)."""

    @staticmethod
    def cross_attention(config: HfvlmBLIPTextConfig, layer: int) -> nn.Module:
        return ImagePair(config, layer) if layer < 6 else MergingPair(config, layer)


def _pair_names(key: str) -> list[str]:
    """Name the parameter of a model for one image as it is here: the projections of its cross-attention, twice."""
    projection = re.search(r"\.cross_attention\.(?=[qkv]_proj|out_proj)", key)
    if projection is None:
        return [key]
    return [f"{key[: projection.end()]}{place}.{key[projection.end() :]}" for place in ("first", "second")]


class HfvlmBLIPForVisualReasoning(HfvlmBLIPPreTrainedModel):
    """Predicts whether a sentence about two images is true (NLVR2).

    `from_pretrained` also takes the folder of a BLIP with a text encoder and another head: pretraining, matching or
    features. Its one cross-attention then initialises both; the classifier and the merging layers are new.
    """

    config: HfvlmBLIPConfig
    images_per_text = 2
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]

    def __init__(self, config: HfvlmBLIPConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_model = HfvlmBLIPVisionModel._from_config(config.vision_config)
        self.text_model = PairTextModel._from_config(config.text_config)
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        source = pretrained_model_name_or_path
        if source is None or kwargs.get("state_dict") is not None:
            return super().from_pretrained(source, *args, **kwargs)
        where = {name: kwargs[name] for name in SOURCE if name in kwargs}
        found = HfvlmBLIPConfig.get_config_dict(source, **where)[0].get("architectures") or [cls.__name__]
        other: Any = find_class(found[0]) if found[0] != cls.__name__ else None
        if getattr(other, "config_class", None) is not cls.config_class:
            return super().from_pretrained(source, *args, **kwargs)
        with_info = {"output_loading_info": kwargs.pop("output_loading_info", False)}
        return cls.begin_with(other.from_pretrained(source, *args, **kwargs), **with_info)

    @classmethod
    def begin_with(cls, other: PreTrainedModel, *, output_loading_info: bool = False) -> Any:
        """Begin with the towers of a BLIP that was trained on single images.

        Args:
            other: a model with a vision tower and a text encoder; it is not changed.
            output_loading_info: return what `from_pretrained` reports of the new parameters, too.

        Raises:
            ValueError: it has no text encoder, as a captioner has none.
        """
        if not hasattr(other, "text_model"):
            raise ValueError(f"{type(other).__name__} has no text encoder: {cls.__name__} cannot begin with it.")
        config = copy.deepcopy(other.config)
        config.architectures = [cls.__name__]
        config.vision_config.projection_dim = config.text_config.projection_dim = None
        tensors: dict[str, Tensor] = {}
        for key, tensor in other.state_dict().items():
            if re.match(r"(vision_model|text_model)\.(?!projection\.)", key):
                tensors |= {name: tensor.detach().clone() for name in _pair_names(key)}
        info: dict[str, Any] = {"output_loading_info": output_loading_info}
        return super().from_pretrained(None, config=config, state_dict=tensors, dtype=other.dtype, **info)

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
        """Classify sentences about two images -> logits `(B, 2)`, the second for "true".

        Args:
            pixel_values: `(B, 2, C, H, W)`, normalised.
            input_ids: `(B, N)`; [ENC] takes the place of their first token.
            attention_mask: `(B, N)`, 0 for padding on either side.
            labels: `(B,)`, 1 for true sentences.
            interpolate_pos_encoding: take images of any size.
        """
        images = pixel_values.flatten(0, 1)
        tokens = self.vision_model(images, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state
        context = Context(tokens.unflatten(0, (-1, 2)).flatten(1, 2))
        text = self.text_model.ground(input_ids, attention_mask, context, **kwargs)
        logits = self.classifier(text.pooler_output)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=text.hidden_states, attentions=text.attentions
        )
