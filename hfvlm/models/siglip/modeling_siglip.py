"""SigLIP (https://arxiv.org/abs/2303.15343) and SigLIP 2 (https://arxiv.org/abs/2502.14786).

Source: https://github.com/google-research/big_vision at 0127fb6.
"""

from math import isqrt
from typing import Unpack

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.losses import sigmoid_loss
from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.dual_encoder import DualEncoder
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.text import BidirectionalTextTower
from hfvlm.modeling.vision import ImageClassifier, PatchTower, VisionTower
from hfvlm.models.siglip.configuration_siglip import (
    HfvlmSigLIPConfig,
    HfvlmSigLIPNaFlexVisionConfig,
    HfvlmSigLIPTextConfig,
    HfvlmSigLIPVisionConfig,
)
from hfvlm.modules.pooling import AttentionPool
from hfvlm.modules.positions import ALIGNED_CORNERS, sampled_grid
from hfvlm.modules.similarity import BiasedLogitScale
from hfvlm.modules.transformer import PreNormLayer, Stack


class HfvlmSigLIPPreTrainedModel(HfvlmPreTrainedModel):
    """Initialises linear layers as big_vision does."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)


class HfvlmSigLIPVisionModel(PatchTower, HfvlmSigLIPPreTrainedModel):
    """A vision transformer without class token, pooled by attention."""

    config: HfvlmSigLIPVisionConfig
    resize_rule = ALIGNED_CORNERS

    def __init__(self, config: HfvlmSigLIPVisionConfig):
        super().__init__(config)
        self.layers = Stack(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pool = AttentionPool(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, C, H, W)` normalised pixels -> all tokens after the last norm, and the pooled output.

        With `interpolate_pos_encoding`, images may have any size; the position table is resized to it.
        """
        x = self.embed(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        x = self.post_norm(self.layers(x, **kwargs))
        pooled = self.pool(x, **kwargs)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=pooled)


class HfvlmSigLIPNaFlexVisionModel(VisionTower, HfvlmSigLIPPreTrainedModel):
    """The same transformer over the patches of images that keep their aspect ratios, padded to one length."""

    config: HfvlmSigLIPNaFlexVisionConfig
    _input_embed_layer = "patches"

    def __init__(self, config: HfvlmSigLIPNaFlexVisionConfig):
        super().__init__(config)
        edge = isqrt(config.num_patches)
        self.patches = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position = nn.Parameter(torch.zeros(edge, edge, config.hidden_size))
        self.layers = Stack(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pool = AttentionPool(config)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.position, std=self.config.hidden_size**-0.5)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """Patches -> their tokens after the last norm (meaningless where padded), and the pooled output.

        Args:
            pixel_values: `(B, N, patch_size * patch_size * C)`, each patch flattened by row, column, channel.
            pixel_attention_mask: `(B, N)`, 1 for a patch and 0 for padding, which is on the right.
            spatial_shapes: `(B, 2)`, rows and columns of each image's patches.
        """
        index = torch.arange(pixel_values.shape[1], device=pixel_values.device)
        index = torch.where(index < spatial_shapes.prod(dim=1, keepdim=True), index, 0)
        columns = spatial_shapes[:, 1:]
        position = sampled_grid(self.position, index // columns, index % columns, spatial_shapes)
        x = self.patches(pixel_values.to(self.position.dtype)) + position
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=pixel_attention_mask)
        x = self.post_norm(self.layers(x, mask, **kwargs))
        probe = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=x[:, :1],
            attention_mask=pixel_attention_mask,
            encoder_hidden_states=x,
        )
        pooled = self.pool(x, probe, **kwargs)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=pooled)


class HfvlmSigLIPTextModel(BidirectionalTextTower, HfvlmSigLIPPreTrainedModel):
    """A bidirectional transformer that pools its last position."""

    config: HfvlmSigLIPTextConfig
    projection_bias = True


class HfvlmSigLIPModel(DualEncoder):
    """Images and texts in one space, with a loss of each pair on its own.

    With a NaFlex tower, forward takes its `pixel_values`, `pixel_attention_mask` and `spatial_shapes`.
    """

    config: HfvlmSigLIPConfig
    base_model_prefix = "siglip"
    image_inputs = ("interpolate_pos_encoding", "pixel_attention_mask", "spatial_shapes")
    logit_scale: BiasedLogitScale
    pair_loss = staticmethod(sigmoid_loss)

    def __init__(self, config: HfvlmSigLIPConfig):
        super().__init__(config)
        self.build_towers(config)
        self.logit_scale = BiasedLogitScale(config.logit_scale_init_value, config.logit_bias_init_value)
        self.post_init()


class HfvlmSigLIPForImageClassification(ImageClassifier):
    """A linear layer on the vision tower's pooled output."""

    config: HfvlmSigLIPConfig
    base_model_prefix = "siglip"
