"""Shikra (https://arxiv.org/abs/2306.15195; github.com/shikras/shikra at ff79a4c)."""

from typing import Unpack

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.image_text import ProjectedModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import media_features
from hfvlm.modeling.scoring import TextScorer
from hfvlm.models.shikra.configuration_shikra import HfvlmShikraConfig


class HfvlmShikraForConditionalGeneration(ProjectedModel):
    """A language model that attends to CLIP's patches through one linear layer, with regions as numbers in its text.

    Unlike the original, which uses the last alone, it attends to every image of a text.
    """

    config: HfvlmShikraConfig

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """Project images to an output whose `pooler_output` has one `(patches, hidden_size)` tensor an image.

        Args:
            pixel_values: `(images, 3, H, W)`.
        """
        vision = self.vision_model(pixel_values, until=self.config.vision_feature_layer, **kwargs)
        return media_features(vision, self.projector(vision.last_hidden_state[:, 1:]))


class HfvlmShikraForSequenceClassification(TextScorer, HfvlmShikraForConditionalGeneration):
    """A reward, or other scores, of answers about images."""
