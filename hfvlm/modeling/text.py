"""Bases of text towers."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from hfvlm.modeling.base import HfvlmPreTrainedModel, other_towers
from hfvlm.modeling.compat import causal_mask
from hfvlm.modules.embeddings import TokenEmbedding
from hfvlm.modules.pooling import end_of_text
from hfvlm.modules.positions import resize_line
from hfvlm.modules.projection import projection
from hfvlm.modules.transformer import PreNormLayer, Stack


def mask_of_one(config: Any, x: Tensor, attention_mask: Tensor | None) -> Any:
    """Make the mask of one query for each text `(B, N, D)` over its tokens, `(B, N)` with 0 for those it must not see,
    in the form that `config`'s attention takes."""
    return create_bidirectional_mask(
        config=config, inputs_embeds=x[:, :1], attention_mask=attention_mask, encoder_hidden_states=x
    )


class TextTower(HfvlmPreTrainedModel):
    """Base of towers over token ids."""

    base_model_prefix = "text_model"
    _keys_to_ignore_on_load_unexpected = other_towers("text_model")
    input_modalities = ["text"]
    _input_embed_layer = "token"


class CausalTextTower(TextTower):
    """Base of causal transformers that pool the end-of-text token: CLIP's and those built like it.

    They were trained without a padding mask: padding follows the end-of-text token, so causal attention never sees it.
    With an `attention_mask`, `(B, N)`, 0 for padding, it may come before the text as well. A subclass norms, pools and
    projects in its forward.

    Attributes:
        projection_bias: whether the projection into the joint space has a bias.
    """

    projection_bias: ClassVar[bool] = False
    pools_one_token = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.embeddings = TokenEmbedding(config)
        self.layers = Stack(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = projection(config, bias=self.projection_bias)
        self.post_init()

    def read(self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """Run the layers: `(B, N)` token ids -> `(B, N, D)`, before the last norm, or, with `pooled_only`, `(B, 1, D)`
        of the end-of-text tokens."""
        x = self.embeddings(input_ids, attention_mask)
        mask = causal_mask(self.config, x, attention_mask)
        if kwargs.get("pooled_only"):
            ends = end_of_text(input_ids, self.config.eos_token_id, attention_mask).unsqueeze(-1)
            before = torch.arange(x.shape[1], device=x.device) <= ends
            visible = before if attention_mask is None else before & attention_mask.bool()
            kwargs["pooled_mask"] = mask_of_one(self.config, x, visible)
        pool = partial(self.end_tokens, input_ids=input_ids, attention_mask=attention_mask)
        return self.layers(x, mask, pool=pool, **kwargs | {"is_causal": True})

    def end_tokens(self, x: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Take the end-of-text token of each text: `(B, N, D)`, or `(B, 1, D)` of it alone -> `(B, D)`."""
        if x.shape[1] == 1:
            return x[:, 0]
        ends = end_of_text(input_ids, self.config.eos_token_id, attention_mask)
        return x[torch.arange(x.shape[0], device=x.device), ends]

    def resize_positions(self, context_length: int) -> None:
        """Change the number of positions for good, as open_clip does when it loads a file."""
        self.embeddings.position = nn.Parameter(resize_line(self.embeddings.position.data, context_length))
        self.config.max_position_embeddings = context_length
