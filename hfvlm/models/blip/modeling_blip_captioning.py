"""BLIP for captions (https://arxiv.org/abs/2201.12086, section 3.1).

Source: https://github.com/salesforce/BLIP at 056a169, models/blip.py.
"""

from typing import Unpack

from torch import Tensor
from torch.nn import functional as F
from transformers.utils.generic import can_return_tuple

from hfvlm.losses import captioning_loss
from hfvlm.modeling.captioning import CaptioningModel, CaptioningOutput, begin_with
from hfvlm.modeling.keywords import Keywords
from hfvlm.models.blip.configuration_blip import HfvlmBLIPConfig
from hfvlm.models.blip.modeling_blip import HfvlmBLIPPreTrainedModel, HfvlmBLIPTextDecoder, HfvlmBLIPVisionModel
from hfvlm.modules.context import Context


class HfvlmBLIPForConditionalGeneration(CaptioningModel, HfvlmBLIPPreTrainedModel):
    """Captions images."""

    config: HfvlmBLIPConfig
    main_input_name = "pixel_values"

    def __init__(self, config: HfvlmBLIPConfig):
        super().__init__(config)
        self.vision_model = HfvlmBLIPVisionModel._from_config(config.vision_config)
        self.text_decoder = HfvlmBLIPTextDecoder._from_config(config.text_config)
        self.post_init()

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return begin_with(self.config.text_config.bos_token_id, input_ids, attention_mask)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[Keywords],
    ) -> CaptioningOutput:
        """Score each next token of texts about images and, with `labels`, compute the loss.

        Args:
            pixel_values: `(B, C, H, W)`, normalised.
            input_ids: `(B * T, N)`, T texts about each image; [DEC] takes the place of their first token.
            attention_mask: `(B * T, N)`, 0 for padding on either side.
            labels: `(B * T, N)`, the ids to predict in their own positions, -100 for padding and a prompt.
            shift_labels: `(B * T, N)`, labels that are shifted already: those of each next token.
            interpolate_pos_encoding: take images of any size.
        """
        vision = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        context = Context(vision.last_hidden_state)
        decoder = self.text_decoder(self.begin(input_ids, attention_mask), attention_mask, context, **kwargs)
        output = CaptioningOutput(logits=decoder.logits, vision_model_output=vision, text_decoder_output=decoder)
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        if shift_labels is not None:
            smoothing, count = self.config.label_smoothing, kwargs.get("num_items_in_batch")
            output.loss = captioning_loss(decoder.logits, shift_labels, label_smoothing=smoothing, num_items=count)
        return output
