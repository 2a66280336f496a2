"""Towers of CLIP's successors, where these have another structure.

CLIPA: https://arxiv.org/abs/2305.07017; MetaCLIP 2: https://arxiv.org/abs/2507.22062; MobileCLIP 2:
https://arxiv.org/abs/2508.20691. Source: https://github.com/mlfoundations/open_clip at 89fb801.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from hfvlm.modeling.base import DepthScaledModel
from hfvlm.modeling.text import BidirectionalTextTower
from hfvlm.models.clip.modeling_clip import HfvlmCLIPTextModel, HfvlmCLIPVisionModel
from hfvlm.models.clip.towers.configuration_variants import (
    HfvlmCLIPATextConfig,
    HfvlmCLIPAVisionConfig,
    HfvlmCLIPBidirectionalTextConfig,
    HfvlmMetaCLIP2TextConfig,
)
from hfvlm.modules.pooling import end_of_text, first_of, tokens_at


class HfvlmCLIPAVisionModel(HfvlmCLIPVisionModel):
    """CLIPA's vision transformer: no norm before the layers, and the mean of the patches is pooled, not the class
    token."""

    config: HfvlmCLIPAVisionConfig
    pools_one_token = False
    first_norm = nn.Identity

    def pooling(self, x: Tensor) -> Tensor:
        return x[:, 1:].mean(dim=1)


class HfvlmCLIPATextModel(BidirectionalTextTower, DepthScaledModel):
    """CLIPA's text transformer, which pools the last position: padding, in most texts."""

    config: HfvlmCLIPATextConfig


class HfvlmCLIPBidirectionalTextModel(BidirectionalTextTower, DepthScaledModel):
    """MobileCLIP 2's text transformer, which pools the end-of-text token."""

    config: HfvlmCLIPBidirectionalTextConfig

    def pooling(self, input_ids: Tensor, attention_mask: Tensor | None) -> Callable[[Tensor], Tensor]:
        return partial(tokens_at, positions=end_of_text(input_ids, self.config.eos_token_id, attention_mask))


class HfvlmMetaCLIP2TextModel(HfvlmCLIPTextModel):
    """MetaCLIP 2's text transformer, whose end-of-text token is not the largest id: it pools the first of them, and in
    texts without one the first token."""

    config: HfvlmMetaCLIP2TextConfig

    def ends(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return first_of(input_ids, self.config.eos_token_id, attention_mask)
