"""MERLOT Reserve's towers of single frames and of clips of audio.

Source: https://github.com/rowanz/merlot_reserve at d22c50f, mreserve/modeling.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.vision import ImageClassifier
from hfvlm.models.merlot_reserve.configuration_merlot_reserve import (
    HfvlmMERLOTReserveAudioConfig,
    HfvlmMERLOTReserveConfig,
    HfvlmMERLOTReserveVisionConfig,
)
from hfvlm.models.merlot_reserve.encoders import (
    ClassTokenEncoder,
    GroupPool,
    RotaryAttention,
    centred,
    grid_coordinates,
)
from hfvlm.modules.embeddings import PatchEmbedding
from hfvlm.modules.transformer import PreNormLayer

# One folder serves several heads and towers; each leaves unused what it has no part for.
PARTS = [r"^(vision_model|audio_model|embeddings|joint|span|head|classifier|(image|audio|span)_logit_scale)\."]


@dataclass
class ReserveTowerOutput(TowerOutput):
    """The output of a tower.

    Args:
        tokens: `(B, T, D)`, pooled groups of its tokens, the joint encoder's inputs.
    """

    tokens: Tensor | None = None


class HfvlmMERLOTReservePreTrainedModel(HfvlmPreTrainedModel):
    """Base of all classes."""

    _keys_to_ignore_on_load_unexpected = PARTS
    _can_record_outputs = {
        "hidden_states": PreNormLayer,
        "attentions": OutputRecorder(RotaryAttention, index=1, layer_name="layers"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as the original: wide layers by their inputs, and less than others, for the depth."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d):
            std = min(18.0 / module.weight[0].numel(), self.config.initializer_range) / 2**0.5
            init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, GroupPool):
            for part in (module.attention.q_proj, module.attention.k_proj, module.attention.v_proj):
                init.normal_(part.weight, std=part.in_features**-0.5)
            init.normal_(module.attention.out_proj.weight, std=module.attention.out_proj.in_features**-0.5)


class ReserveTower(HfvlmMERLOTReservePreTrainedModel, ABC):
    """Base of the towers: patches with a class token, and groups of them pooled for the joint encoder."""

    config: Any
    patches: Any
    _input_embed_layer = "patches"

    def __init__(self, config: Any):
        super().__init__(config)
        self.patches = self.make_patches(config)
        self.encoder = ClassTokenEncoder(config, config.num_hidden_layers)
        self.pool = GroupPool(config)
        self.post_init()

    @abstractmethod
    def make_patches(self, config: Any) -> nn.Module:
        """Make the module that turns inputs into patches."""

    def encode(self, patches: Tensor, coordinates: Tensor, groups: Callable[[Tensor], Tensor], **kwargs: Any) -> Any:
        """Encode patches `(B, N, D)` at coordinates `(1, N, A)` -> all tokens, class token first, that token, its
        projection, and the means of `groups`, which makes `(B, T, K, D)` of `(B, N, D)`."""
        x = self.encoder(patches, coordinates, **kwargs)
        pooled, tokens = x[:, 0], self.pool(groups(x[:, 1:]))
        embeds = self.encoder.projection(pooled)
        return ReserveTowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=embeds, tokens=tokens)


class HfvlmMERLOTReserveVisionModel(ReserveTower):
    """The vision transformer of single frames."""

    config: HfvlmMERLOTReserveVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def make_patches(self, config: HfvlmMERLOTReserveVisionConfig) -> nn.Module:
        return PatchEmbedding(config)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> ReserveTowerOutput:
        """`(B, C, H, W)` pixels in 0..1, of any even grid of patches -> all tokens, class token first, that token, its
        projection, and the pooled tokens."""
        pool, (rows, columns) = self.config.pool_size, self.config.pooled_grid(pixel_values)
        coordinates = grid_coordinates(rows * pool, columns * pool, pixel_values.device).unsqueeze(0)

        def squares(x: Tensor) -> Tensor:
            return x.unflatten(1, (rows, pool, columns, pool)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

        return self.encode(self.patches(pixel_values), coordinates, squares, **kwargs)


class HfvlmMERLOTReserveAudioModel(ReserveTower):
    """The transformer of clips of audio, three of which a segment of 5 s has."""

    config: HfvlmMERLOTReserveAudioConfig
    base_model_prefix = "audio_model"
    main_input_name = "input_features"
    input_modalities = ["audio"]

    def make_patches(self, config: HfvlmMERLOTReserveAudioConfig) -> nn.Module:
        return nn.Conv1d(config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, input_features: Tensor, **kwargs: Unpack[Keywords]) -> ReserveTowerOutput:
        """`(B, num_frames, num_channels)` log mel spectrograms, the playback speed as their last channel -> as the
        vision tower."""
        config = self.config
        if tuple(input_features.shape[1:]) != (config.num_frames, config.num_channels):
            raise ValueError(
                f"input_features are {tuple(input_features.shape)}; clips of (num_frames {config.num_frames}, "
                f"num_channels {config.num_channels}) are needed: use the processor."
            )
        x = self.patches(input_features.to(self.patches.weight.dtype).transpose(1, 2)).transpose(1, 2)
        coordinates = centred(x.shape[1], x.device)[None, :, None] / x.shape[1]
        return self.encode(x, coordinates, lambda x: x.unflatten(1, (config.num_tokens, -1)), **kwargs)


class HfvlmMERLOTReserveForImageClassification(ImageClassifier):
    """A linear layer on the class token of single frames, before its projection."""

    config: HfvlmMERLOTReserveConfig
    base_model_prefix = "merlot_reserve"
    _keys_to_ignore_on_load_unexpected = [
        r"^(?!vision_model\.|classifier\.)",
        r"^vision_model\.(encoder\.projection|pool)\.",
    ]

    def leave_out(self) -> None:
        """Take out of the tower what only embeddings, and the joint encoder, need."""
        self.vision_model.encoder.projection, self.vision_model.pool = nn.Identity(), nn.Identity()
