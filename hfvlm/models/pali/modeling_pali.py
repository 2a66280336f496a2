"""PaLI (https://arxiv.org/abs/2209.06794, section 3.1), of which there is no original: a ViT and mT5.

The encoder's inputs are the patches of an image after the ViT's last norm, projected, and then the embeddings of a
text; mT5's relative positions run over both, and nothing of an image is masked.
"""

from typing import Any, Unpack

from torch import Tensor
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.image_text_seq2seq import Seq2SeqImageTextModel, UntiedT5
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import media_features
from hfvlm.models.pali.configuration_pali import HfvlmPaLIConfig
from hfvlm.modules.projection import Projector


class HfvlmPaLIForConditionalGeneration(Seq2SeqImageTextModel):
    """A ViT's patches and a text, encoded together by mT5; the decoder generates the answer to every task."""

    config: HfvlmPaLIConfig

    def __init__(self, config: HfvlmPaLIConfig):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        text: Any = config.text_config
        self.projector = Projector(config.vision_config.hidden_size, text.d_model, config.projector_depth)
        self.language_model = UntiedT5._from_config(text)
        self.post_init()

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """Project images to an output whose `pooler_output` has one `(patches, d_model)` tensor an image.

        Args:
            pixel_values: `(images, 3, H, W)`.
        """
        vision = self.vision_model(pixel_values, **kwargs)
        return media_features(vision, self.projector(vision.last_hidden_state))
