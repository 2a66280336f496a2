"""BLIP for retrieval in two stages (https://arxiv.org/abs/2201.12086, section 5.1).

Source: https://github.com/salesforce/BLIP at 056a169, models/blip_itm.py and models/blip_retrieval.py.
"""

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple

from hfvlm.losses.processes import positives
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.matching import MatchingModel, MatchingOutput
from hfvlm.models.blip.configuration_blip import HfvlmBLIPConfig
from hfvlm.models.blip.modeling_blip import HfvlmBLIPModel
from hfvlm.modules.context import Context


class HfvlmBLIPForImageTextRetrieval(HfvlmBLIPModel, MatchingModel):
    """Finds candidates by their embeddings, and matches the best of them with the query."""

    least_weight = 0.0  # of a negative in the draw

    def build_heads(self, config: HfvlmBLIPConfig) -> None:
        self.itm_head = nn.Linear(config.text_config.hidden_size, 2)

    def match(self, input_ids: Tensor, attention_mask: Tensor | None, context: Context, **kwargs: Any) -> Tensor:
        """Match texts `(B * T, N)`, T for each of B rows of a context -> `(B * T, 2)`, the second for a match."""
        return self.itm_head(self.text_model.ground(input_ids, attention_mask, context, **kwargs).pooler_output)

    def match_tokens(self, input_ids: Tensor, attention_mask: Tensor, image_tokens: Tensor) -> Tensor:
        return self.match(input_ids, attention_mask, Context(image_tokens))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        return_loss: bool | None = None,
        **kwargs: Unpack[Keywords],
    ) -> MatchingOutput:
        """Compare every text with every image by their embeddings, as `HfvlmBLIPModel`.

        With `return_loss`, text i must belong to image i, and the loss is the contrastive one and that of matching
        each pair against a negative image and a negative text, which are drawn from the batch among the most similar.
        """
        output = super().forward(input_ids, pixel_values, attention_mask, **kwargs)
        if return_loss:
            output.contrastive_loss = self.contrast(output)
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            same = positives(input_ids.shape[0], None, input_ids.device, None)
            pairs = output.vision_model_output.last_hidden_state, input_ids, mask
            output.add_matching(self.match_negatives(output, pairs, same))
        return output

    def shares(self, scores: Tensor, same: Tensor) -> Tensor:
        """Turn `(B, all)` similarities into the probability of each negative, up to a factor.

        The original's softmax is over positives too: next to one that is far more similar, the probabilities of all
        negatives are zero; they are computed without it then.
        """
        weights = (scores.softmax(dim=1) + self.least_weight).masked_fill(same, 0)
        return torch.where(weights.sum(dim=1, keepdim=True) > 1e-30, weights, super().shares(scores, same))
