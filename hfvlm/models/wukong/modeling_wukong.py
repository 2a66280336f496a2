"""Wukong (https://arxiv.org/abs/2202.06767), and the FILIP (https://arxiv.org/abs/2111.07783) and CLIP of its authors.

Source: huawei-noah/Pretrained-Language-Model at 0598f02 (Noah_WuKong), which evaluates and does not train. An image's
token matches the padding of a text, whose embedding is zero, where no word is more similar than zero. The loss is the
papers', which leaves padding out.
"""

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.configuration import joint_size
from hfvlm.losses import contrastive_loss, late_interaction_loss, late_interaction_scores
from hfvlm.modeling.base import DepthScaledModel, as_features, other_towers
from hfvlm.modeling.dual_encoder import DualEncoder
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.text import CausalTextTower, without_padding
from hfvlm.modeling.trunks import HfvlmVisionTrunkModel
from hfvlm.modeling.vision import ImageClassifier
from hfvlm.models.clip.modeling_clip import HfvlmCLIPVisionModel
from hfvlm.models.wukong.configuration_wukong import (
    REDUCTION_GROUPS,
    HfvlmWukongCLIPConfig,
    HfvlmWukongCLIPTextConfig,
    HfvlmWukongConfig,
    HfvlmWukongTextConfig,
    HfvlmWukongTrunkConfig,
    HfvlmWukongVisionConfig,
)
from hfvlm.modules.projection import Bridge
from hfvlm.modules.similarity import LogitScale

# What is in the composite next to its towers.
REDUCTION = r"^token_reduction\."


class HfvlmWukongVisionModel(HfvlmCLIPVisionModel):
    """CLIP's vision transformer, whose patches are the embedding."""

    config: HfvlmWukongVisionConfig
    _keys_to_ignore_on_load_unexpected = [*other_towers("vision_model"), REDUCTION]
    pools_one_token = False

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, C, H, W)` normalised pixels -> all tokens before the last norm, class token first, that token after it,
        and the patches in the joint space `(B, N, D)`.

        With `interpolate_pos_encoding`, images may have any size; the position table is resized to it.
        """
        x = self.embed(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        x = self.layers(self.pre_norm(x), **kwargs)
        tokens = self.post_norm(x)
        return TowerOutput(last_hidden_state=x, pooler_output=tokens[:, 0], embeds=self.projection(tokens[:, 1:]))


class HfvlmWukongTrunkModel(HfvlmVisionTrunkModel):
    """A vision model of transformers, whose tokens are the embedding; their mean is pooled."""

    config: HfvlmWukongTrunkConfig
    _keys_to_ignore_on_load_unexpected = [*other_towers("vision_model"), REDUCTION]

    def embed(self, inputs: Tensor, mask: Tensor | None = None, **kwargs: Any) -> TowerOutput:
        output = super().embed(inputs, mask, **kwargs)
        output.embeds = self.projection(output.last_hidden_state)
        return output


class HfvlmWukongTextModel(CausalTextTower, DepthScaledModel):
    """CLIP's causal text transformer, whose tokens are the embedding; it pools the last token before the padding."""

    config: HfvlmWukongTextConfig
    _keys_to_ignore_on_load_unexpected = [*other_towers("text_model"), REDUCTION]
    pools_one_token = False

    def mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return where ids `(B, N)` are no padding."""
        return (input_ids != self.config.pad_token_id) if attention_mask is None else attention_mask.bool()

    def ends(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        mask = self.mask(input_ids, attention_mask)
        return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, N)` token ids -> all tokens, the last of each text, and what `joined` takes of these, projected."""
        x = self.post_norm(self.read(input_ids, attention_mask, **kwargs))
        pooled = self.end_tokens(x, input_ids, attention_mask)
        embeds = self.projection(self.joined(x, pooled))
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=embeds)

    def joined(self, x: Tensor, pooled: Tensor) -> Tensor:
        """Take what enters the joint space: all tokens `(B, N, D)`, or the last of each text `(B, D)`."""
        return x


class HfvlmWukongCLIPTextModel(HfvlmWukongTextModel):
    """The same transformer, whose pooled token is the embedding."""

    config: HfvlmWukongCLIPTextConfig
    pools_one_token = True

    def joined(self, x: Tensor, pooled: Tensor) -> Tensor:
        return pooled


class TokenReduction(Bridge):
    """Weighted sums of tokens, each with its own learned weights (the paper's reduced-token interaction)."""

    def __init__(self, size: int, num_tokens: int):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.mix = nn.Conv1d(size, size, 1, groups=REDUCTION_GROUPS, bias=False)
        self.weigh = nn.Conv1d(size, num_tokens, 1, bias=False)
        self.value = nn.Conv1d(size, size, 1, groups=REDUCTION_GROUPS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, D)` -> `(B, num_tokens, D)`."""
        weights = self.weigh(self.mix(self.norm(x).mT)).softmax(dim=-1)
        return weights @ self.value(x.mT).mT


def reduction(config: HfvlmWukongConfig) -> nn.Module:
    """Make the token reduction; without `num_image_tokens`, the patches stay as they are."""
    if config.num_image_tokens is None:
        return nn.Identity()
    return TokenReduction(joint_size(config.vision_config), config.num_image_tokens)


class HfvlmWukongModel(DualEncoder):
    """Images and texts, compared token by token: patches or, with `num_image_tokens`, learned sums of them."""

    config: HfvlmWukongConfig
    base_model_prefix = "wukong"
    pair_loss = staticmethod(late_interaction_loss)
    max_logit_scale = 100.0

    def __init__(self, config: HfvlmWukongConfig):
        super().__init__(config)
        self.build_towers(config)
        self.token_reduction = reduction(config)
        self.logit_scale = LogitScale(config.logit_scale_init_value)
        self.post_init()

    def encode_image(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        features = as_features(self.vision_model(pixel_values, **kwargs))
        features.pooler_output = self.token_reduction(features.pooler_output)
        return features

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embed texts as long as the tower has positions: how an image is scored depends on there being padding, not
        on the other texts of a batch. Columns that are padding in all of them are not computed."""
        mask, input_ids = without_padding(self.text_model.mask(input_ids, attention_mask), input_ids)
        features = as_features(self.text_model(input_ids, None if attention_mask is None else mask.long(), **kwargs))
        missing = self.text_model.config.max_position_embeddings - mask.shape[1]
        tokens: Any = features.pooler_output
        features.pooler_output = F.pad(tokens * mask.unsqueeze(-1), (0, 0, 0, missing))
        return features

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """`(B, C, H, W)` -> an output whose `pooler_output`, `(B, tokens, D)`, are the embeddings of the patches or of
        `num_image_tokens` sums of them, not normalised."""
        return self.encode_image(pixel_values, **kwargs)

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """`(B, N)` -> an output whose `pooler_output`, `(B, max_position_embeddings, D)`, are the embeddings of the
        tokens, not normalised, and zero for padding."""
        return self.encode_text(input_ids, attention_mask, **kwargs)

    @staticmethod
    def score(queries: Tensor, gallery: Tensor) -> Tensor:
        """`(A, N, D)`, `(B, M, D)` tokens -> `(A, B)`, means over the queries' tokens, without padding, of their best
        match; padding in the gallery matches with zero."""
        return late_interaction_scores(queries, gallery, queries.any(dim=-1))

    def both_ways(self, image_embeds: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(image_embeds, text_embeds), self.score(text_embeds, image_embeds)

    def loss_of_pairs(self, output: Any, pair_loss: Callable[..., Tensor], group: ProcessGroup | None) -> Tensor:
        """Apply `late_interaction_loss`, or another that takes its arguments, to rows of tokens."""
        image, text = output.image_embeds, output.text_embeds
        return pair_loss(image, text, output.logit_scale, b_mask=text.any(dim=-1), group=group)


class HfvlmWukongCLIPModel(DualEncoder):
    """Images and texts in one space, as CLIP."""

    config: HfvlmWukongCLIPConfig
    base_model_prefix = "wukong"
    pair_loss = staticmethod(contrastive_loss)
    max_logit_scale = 100.0

    def __init__(self, config: HfvlmWukongCLIPConfig):
        super().__init__(config)
        self.build_towers(config)
        self.logit_scale = LogitScale(config.logit_scale_init_value)
        self.post_init()


class HfvlmWukongForImageClassification(ImageClassifier):
    """A linear layer on the class token."""

    config: HfvlmWukongConfig
    base_model_prefix = "wukong"
    _keys_to_ignore_on_load_unexpected = [*ImageClassifier._keys_to_ignore_on_load_unexpected, REDUCTION]


class HfvlmWukongCLIPForImageClassification(ImageClassifier):
    """A linear layer on the class token, of the CLIP among them."""

    config: HfvlmWukongCLIPConfig
    base_model_prefix = "wukong"
