"""Shikra (https://arxiv.org/abs/2306.15195; github.com/shikras/shikra at ff79a4c)."""

from typing import Unpack

from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.image_text import ImageTextModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import media_features
from hfvlm.models.clip.modeling_clip import HfvlmCLIPVisionModel
from hfvlm.models.shikra.configuration_shikra import HfvlmShikraConfig
from hfvlm.modules.projection import Projector


class HfvlmShikraForConditionalGeneration(ImageTextModel):
    """A language model that reads CLIP's patches through one linear layer, and places as numbers in its text.

    Unlike the original, which keeps the last alone, it reads every picture of a text.
    """

    config: HfvlmShikraConfig

    def __init__(self, config: HfvlmShikraConfig):
        super().__init__(config)
        self.vision_model = HfvlmCLIPVisionModel._from_config(config.vision_config)
        self.projector = Projector(config.vision_config.hidden_size, config.text_config.hidden_size, depth=1)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()
        self.freeze_unread()

    @property
    def unread_modules(self) -> list[str]:
        return [f"vision_model.{name}" for name in self.vision_model.unread(self.config.vision_feature_layer)]

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """Pictures -> an output whose `pooler_output` has one `(patches, hidden_size)` tensor a picture.

        Args:
            pixel_values: `(pictures, 3, H, W)`.
        """
        vision = self.vision_model(pixel_values, until=self.config.vision_feature_layer, **kwargs)
        return media_features(vision, self.projector(vision.last_hidden_state[:, 1:]))
