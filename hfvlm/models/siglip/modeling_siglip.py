"""SigLIP (https://arxiv.org/abs/2303.15343) and SigLIP 2 (https://arxiv.org/abs/2502.14786).

Source: https://github.com/google-research/big_vision at 0127fb6.
"""

from math import isqrt
from typing import Unpack

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.losses import sigmoid_loss
from hfvlm.modeling.base import DualEncoder, HfvlmPreTrainedModel, other_towers
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import DualEncoderOutput, TowerOutput
from hfvlm.modeling.vision import ImageClassifier, PatchTower
from hfvlm.models.siglip.configuration_siglip import (
    HfvlmSigLIPConfig,
    HfvlmSigLIPNaFlexVisionConfig,
    HfvlmSigLIPTextConfig,
    HfvlmSigLIPVisionConfig,
)
from hfvlm.modules.embeddings import TokenEmbedding
from hfvlm.modules.pooling import AttentionPool, last_position
from hfvlm.modules.positions import ALIGNED_CORNERS, sampled_grid
from hfvlm.modules.projection import projection
from hfvlm.modules.similarity import BiasedLogitScale
from hfvlm.modules.transformer import PreNormLayer, Stack

logger = logging.get_logger(__name__)


class HfvlmSigLIPPreTrainedModel(HfvlmPreTrainedModel):
    """Initialises linear layers as big_vision does."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)


class HfvlmSigLIPVisionModel(PatchTower, HfvlmSigLIPPreTrainedModel):
    """A vision transformer without class token, summarised by attention."""

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
        """`(B, C, H, W)` normalised pixels -> all tokens after the last norm, and the summary.

        With `interpolate_pos_encoding`, pictures may have any size; the position table is resized to it.
        """
        x = self.embed(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        x = self.post_norm(self.layers(x, **kwargs))
        pooled = self.pool(x, **kwargs)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=pooled)


class HfvlmSigLIPNaFlexVisionModel(HfvlmSigLIPPreTrainedModel):
    """The same transformer over the patches of pictures that keep their aspect ratios, padded to one length."""

    config: HfvlmSigLIPNaFlexVisionConfig
    base_model_prefix = "vision_model"
    _keys_to_ignore_on_load_unexpected = other_towers("vision_model")
    main_input_name = "pixel_values"
    input_modalities = ["image"]

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

    def get_input_embeddings(self) -> nn.Module:
        return self.patches

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """Patches -> their tokens after the last norm (meaningless where padded), and the summary.

        Args:
            pixel_values: `(B, N, patch_size * patch_size * C)`, each patch flattened by row, column, channel.
            pixel_attention_mask: `(B, N)`, 1 for a patch and 0 for padding, which is on the right.
            spatial_shapes: `(B, 2)`, rows and columns of each picture's patches.
        """
        index = torch.arange(pixel_values.shape[1], device=pixel_values.device)
        index = torch.where(index < spatial_shapes.prod(dim=1, keepdim=True), index, 0)
        columns = spatial_shapes[:, 1:]
        position = sampled_grid(self.position, index // columns, index % columns, spatial_shapes)
        x = self.patches(pixel_values.to(self.patches.weight.dtype)) + position
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


class HfvlmSigLIPTextModel(HfvlmSigLIPPreTrainedModel):
    """A bidirectional transformer that reads its last position."""

    config: HfvlmSigLIPTextConfig
    base_model_prefix = "text_model"
    _keys_to_ignore_on_load_unexpected = other_towers("text_model")
    input_modalities = ["text"]
    _input_embed_layer = "token"

    def __init__(self, config: HfvlmSigLIPTextConfig):
        super().__init__(config)
        self.embeddings = TokenEmbedding(config)
        self.layers = Stack(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = projection(config, bias=True)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, N)` token ids, padded to full length -> all tokens after the last norm, and the summary.

        Trained on texts padded to full length without a mask: padding is read like any token, the last position is
        always the pooled output, and `attention_mask` says no more than on which side padding is.
        """
        if input_ids.shape[1] < self.config.max_position_embeddings:
            logger.warning_once(
                f"SigLIP got texts of {input_ids.shape[1]} tokens but was trained on texts padded to "
                f"{self.config.max_position_embeddings}; the embedding will be off. Tokenise with "
                "padding='max_length', as the processor does by default."
            )
        x = self.post_norm(self.layers(self.embeddings(input_ids, attention_mask), **kwargs))
        pooled = last_position(x, attention_mask)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))


class HfvlmSigLIPModel(DualEncoder):
    """Pictures and texts in one space, each pair judged on its own."""

    config: HfvlmSigLIPConfig
    base_model_prefix = "siglip"
    logit_scale: BiasedLogitScale
    pair_loss = staticmethod(sigmoid_loss)

    def __init__(self, config: HfvlmSigLIPConfig):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.text_model = AutoModel.from_config(config.text_config)
        self.logit_scale = BiasedLogitScale(config.logit_scale_init_value, config.logit_bias_init_value)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        *,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[Keywords],
    ) -> DualEncoderOutput:
        """Every text against every picture; with `return_loss`, text i must belong to picture i.

        Args:
            input_ids: `(T, N)`, padded to full length.
            pixel_values: `(I, C, H, W)`, normalised; patches `(I, N, P)` for a NaFlex tower.
            attention_mask: ignored, as in training.
            pixel_attention_mask: `(I, N)`, NaFlex only.
            spatial_shapes: `(I, 2)`, NaFlex only.
            return_loss: also compute the sigmoid loss of the batch.
            interpolate_pos_encoding: take pictures of any size; not for NaFlex, which always does.
        """
        naflex = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        options = naflex if spatial_shapes is not None else {"interpolate_pos_encoding": interpolate_pos_encoding}
        image = self.encode_image(pixel_values, **options, **kwargs)
        text = self.encode_text(input_ids, attention_mask, **kwargs)
        return self.compare(image, text, return_loss=return_loss)


class HfvlmSigLIPForImageClassification(ImageClassifier):
    """A linear layer on the vision tower's summary."""

    config: HfvlmSigLIPConfig
    base_model_prefix = "siglip"
