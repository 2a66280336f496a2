"""ImageBind (https://arxiv.org/abs/2305.05665; https://github.com/facebookresearch/ImageBind at 53680b0)."""

from math import log
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.losses import contrastive_loss
from hfvlm.modeling.base import other_towers
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.multi_encoder import MultiEncoder
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.text import CausalTextTower
from hfvlm.modeling.vision import ClassTokenTower, ImageClassifier
from hfvlm.models.imagebind.configuration_imagebind import (
    HfvlmImageBindAudioConfig,
    HfvlmImageBindConfig,
    HfvlmImageBindDepthConfig,
    HfvlmImageBindIMUConfig,
    HfvlmImageBindTextConfig,
    HfvlmImageBindThermalConfig,
    HfvlmImageBindVisionConfig,
)
from hfvlm.modules.positions import BICUBIC_SAMPLED, resize_grid
from hfvlm.modules.projection import Projection
from hfvlm.modules.similarity import LogitScale
from hfvlm.modules.transformer import Attention, PreNormLayer, Stack

# An image is a clip of this many equal frames, whatever the length of clips.
IMAGE_FRAMES = 2
# No scale grows beyond this.
MAX_SCALE = 100.0
# Of each modality's embeddings; images and videos have none. That of texts is learned.
TEXT_SCALE = 1 / 0.07
FIXED_SCALES = {"audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}


class HfvlmImageBindVisionModel(ClassTokenTower):
    """A vision transformer over patches that reach through time, pooled at its class token."""

    config: HfvlmImageBindVisionConfig
    pools_one_token = True
    input_modalities = ["image", "video"]
    resize_rule = BICUBIC_SAMPLED

    def __init__(self, config: HfvlmImageBindVisionConfig):
        super().__init__(config)
        rows, columns = config.grid
        self.position = nn.Parameter(torch.zeros(1 + config.num_moments * rows * columns, config.hidden_size))
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = Stack(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = Projection(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.class_token, std=self.config.hidden_size**-0.5)
        init.normal_(self.position, std=self.config.hidden_size**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.patches

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """Images `(B, C, H, W)` or clips `(B, C, T, H, W)`, normalised -> all tokens before the last norm, class token
        first, and the pooled output.

        With `interpolate_pos_encoding`, images, and clips as long as an image, may have any size; the position table
        is resized to it.
        """
        x = self.embed(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        x = self.layers(self.pre_norm(x), **kwargs)
        pooled = self.post_norm(x[:, 0])
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))

    def make_patches(self, config: HfvlmImageBindVisionConfig) -> nn.Module:
        return TubeEmbedding(config)

    def positions_for(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool) -> Tensor:
        """Return the position table; for an image, of a model whose clips are longer, the first moment's, as the
        original."""
        frames = IMAGE_FRAMES if pixel_values.ndim == 4 else max(IMAGE_FRAMES, pixel_values.shape[2])
        if frames // self.config.temporal_patch_size > 1:
            return self.position
        position = super().positions_for(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return position[: 1 + (position.shape[0] - 1) // self.config.num_moments]

    def resized(self, grid: tuple[int, int]) -> Tensor:
        moments = self.position[1:].chunk(self.config.num_moments)
        resized = [resize_grid(moment, self.position_grid, grid, **self.resize_rule) for moment in moments]
        return torch.cat([self.position[:1], *resized])


class HfvlmImageBindTextModel(CausalTextTower):
    """A causal transformer that pools its end-of-text token."""

    config: HfvlmImageBindTextConfig

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, N)` token ids -> all tokens before the last norm, and the pooled output; see `CausalTextTower`."""
        x = self.read(input_ids, attention_mask, **kwargs)
        pooled = self.post_norm(self.end_tokens(x, input_ids, attention_mask))
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))


class HfvlmImageBindSensorModel(ClassTokenTower):
    """What the towers of audio, depth, thermal and IMU share: normed patches, a class token, and attention with one
    learned key and value."""

    patch_bias = False
    pools_one_token = True

    def __init__(self, config: Any):
        super().__init__(config)
        width, depth = config.hidden_size, config.num_hidden_layers
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        # PyTorch's default epsilon, unlike those of the layers
        self.patch_norm = nn.LayerNorm(width, eps=1e-5)
        self.layers = Stack(PreNormLayer(config, rate, BiasedAttention(config)) for rate in rates)
        self.post_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.projection_dropout = nn.Dropout(getattr(config, "projection_dropout", 0.0))
        self.projection = Projection(width, config.projection_dim, bias=False)
        self.post_init()

    def encode(self, values: Tensor, **kwargs: Any) -> TowerOutput:
        """Batches of what `patches` takes -> all tokens before the last norm, class token first, and the pooled
        output."""
        x = self.with_prefix(self.patch_norm(self.patches(values)))
        patches, positions = x.shape[1] - 1, self.position.shape[0] - 1
        if patches != positions:
            raise ValueError(
                f"{self.main_input_name} of {tuple(values.shape)} give {patches} patches; "
                f"{type(self).__name__} has positions for {positions}, and they cannot be interpolated: "
                "use the processor."
            )
        x = self.layers(self.patch_dropout(x + self.position), **kwargs)
        pooled = self.post_norm(x[:, 0])
        embeds = self.projection(self.projection_dropout(pooled))
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=embeds)

    def resized(self, grid: tuple[int, int]) -> Tensor:
        raise ValueError(f"The positions of {type(self).__name__} cannot be interpolated: use the processor.")


class HfvlmImageBindAudioModel(HfvlmImageBindSensorModel):
    """Audio, as overlapping patches of spectrograms."""

    config: HfvlmImageBindAudioConfig
    base_model_prefix = "audio_model"
    _keys_to_ignore_on_load_unexpected = other_towers("audio_model")
    main_input_name = "input_features"
    input_modalities = ["audio"]

    def make_patches(self, config: HfvlmImageBindAudioConfig) -> nn.Module:
        return SpectrogramEmbedding(config)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, input_features: Tensor, **kwargs: Unpack[Keywords]) -> TowerOutput:
        """`(B, 1, bins, frames)`, normalised -> all tokens, class token first, and the pooled output."""
        return self.encode(input_features, **kwargs)


class HfvlmImageBindDepthModel(HfvlmImageBindSensorModel):
    """Depth maps, as patches of their disparity."""

    config: HfvlmImageBindDepthConfig
    base_model_prefix = "depth_model"
    _keys_to_ignore_on_load_unexpected = other_towers("depth_model")
    main_input_name = "depth_values"
    input_modalities = ["image"]

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, depth_values: Tensor, **kwargs: Unpack[Keywords]) -> TowerOutput:
        """`(B, 1, H, W)`, normalised disparity -> all tokens, class token first, and the pooled output."""
        return self.encode(depth_values, **kwargs)


class HfvlmImageBindThermalModel(HfvlmImageBindSensorModel):
    """Thermal images."""

    config: HfvlmImageBindThermalConfig
    base_model_prefix = "thermal_model"
    _keys_to_ignore_on_load_unexpected = other_towers("thermal_model")
    main_input_name = "thermal_values"
    input_modalities = ["image"]

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, thermal_values: Tensor, **kwargs: Unpack[Keywords]) -> TowerOutput:
        """`(B, 1, H, W)`, cold to hot as 0 to 1 -> all tokens, class token first, and the pooled output."""
        return self.encode(thermal_values, **kwargs)


class HfvlmImageBindIMUModel(HfvlmImageBindSensorModel):
    """Motion, in pieces of a few samples."""

    config: HfvlmImageBindIMUConfig
    base_model_prefix = "imu_model"
    _keys_to_ignore_on_load_unexpected = other_towers("imu_model")
    main_input_name = "imu_values"
    input_modalities = ["time"]

    def make_patches(self, config: HfvlmImageBindIMUConfig) -> nn.Module:
        return TraceEmbedding(config)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, imu_values: Tensor, **kwargs: Unpack[Keywords]) -> TowerOutput:
        """`(B, 6, N)`, m/s^2 and rad/s -> all tokens, class token first, and the pooled output."""
        return self.encode(imu_values.to(self.position.dtype), **kwargs)


class HfvlmImageBindModel(MultiEncoder):
    """Images, videos, texts, audio, depth maps, thermal images and motion in one space.

    Embeddings of all but images and videos are multiplied by a scale of their modality: that is what the original
    returns, and dot products of them are its logits.
    """

    config: HfvlmImageBindConfig
    base_model_prefix = "imagebind"
    input_modalities = ["image", "video", "text", "audio"]
    anchor = "image"
    pair_loss = staticmethod(contrastive_loss)
    max_logit_scale = MAX_SCALE

    def make_scale(self, modality: str) -> nn.Module | None:
        if modality == "text":
            return CappedScale(log(TEXT_SCALE))
        return FixedScale(FIXED_SCALES[modality]) if modality in FIXED_SCALES else None


class CappedScale(LogitScale):
    """A learned temperature that stays finite."""

    def factor(self) -> Tensor:
        return super().factor().clamp_max(MAX_SCALE)


class FixedScale(nn.Module):
    """A temperature that came with the weights and is not trained, stored as a logarithm."""

    scale: Tensor

    def __init__(self, initial: float):
        super().__init__()
        self.initial = initial
        self.register_buffer("scale", torch.full((1,), log(initial)))

    def init_own_weights(self, std: float) -> None:
        init.constant_(self.scale, log(self.initial))

    def exp(self) -> Tensor:
        """Return the factor itself, shape (1,)."""
        return self()

    def forward(self) -> Tensor:
        return self.scale.exp().clamp_max(MAX_SCALE)


class BiasedAttention(Attention):
    """Attention to the sequence and to one learned key and value."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.bias_k = nn.Parameter(torch.zeros(config.hidden_size))
        self.bias_v = nn.Parameter(torch.zeros(config.hidden_size))

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.bias_k, std=len(self.bias_k) ** -0.5)
        init.normal_(self.bias_v, std=len(self.bias_v) ** -0.5)

    def read(self, source: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().read(source)
        one = (source.shape[0], 1, -1)
        key = torch.cat([key, self.heads(self.bias_k.expand(one)).to(key.dtype)], dim=2)
        return key, torch.cat([value, self.heads(self.bias_v.expand(one)).to(value.dtype)], dim=2)


class TubeEmbedding(nn.Module):
    """(B, C, H, W) or (B, C, T, H, W) -> (B, T/t * H/p * W/p, D), one moment after the other."""

    def __init__(self, config: HfvlmImageBindVisionConfig):
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.projection = nn.Conv3d(config.num_channels, config.hidden_size, size, stride=size, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        clips = pixel_values.unsqueeze(2) if pixel_values.ndim == 4 else pixel_values
        if clips.shape[2] == 1:
            clips = clips.expand(-1, -1, IMAGE_FRAMES, -1, -1)
        return self.projection(clips.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class SpectrogramEmbedding(nn.Module):
    """(B, 1, bins, frames) -> (B, N, D), rows of overlapping patches from the lowest bins to the highest."""

    def __init__(self, config: HfvlmImageBindAudioConfig):
        super().__init__()
        self.projection = nn.Conv2d(1, config.hidden_size, config.patch_size, stride=config.stride, bias=False)

    def forward(self, input_features: Tensor) -> Tensor:
        return self.projection(input_features.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class TraceEmbedding(nn.Module):
    """(B, channels, N) -> (B, N/p, D): p samples of the first channel, then of the second, and so on."""

    def __init__(self, config: HfvlmImageBindIMUConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.projection = nn.Linear(config.num_channels * config.patch_size, config.hidden_size, bias=False)

    def forward(self, imu_values: Tensor) -> Tensor:
        pieces = imu_values.unfold(-1, self.patch_size, self.patch_size)
        return self.projection(pieces.transpose(1, 2).flatten(2))


class HfvlmImageBindForImageClassification(ImageClassifier):
    """A linear layer on the pooled output of the tower of images."""

    config: HfvlmImageBindConfig
    base_model_prefix = "imagebind"
