"""ImageBind's sizes. Defaults are those of the released `imagebind_huge`."""

from dataclasses import field

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import MultiEncoderConfig, SubConfig, TextConfig, TowerConfig, VisionConfig


@strict
class HfvlmImageBindVisionConfig(VisionConfig):
    """The tower of images and videos.

    Args:
        num_frames: of a clip; an image is one that stands still.
        temporal_patch_size: frames that a patch reaches over.
    """

    model_type = "hfvlm_imagebind_vision"

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6
    patch_size: int = 14
    num_frames: int = 2
    temporal_patch_size: int = 2
    projection_dim: int = 1024

    @property
    def num_moments(self) -> int:
        """Patches of a clip along time."""
        return self.num_frames // self.temporal_patch_size

    def validate_frames(self) -> None:
        if self.num_frames < self.temporal_patch_size:
            raise ValueError(
                f"{type(self).__name__}: num_frames {self.num_frames} is less than temporal_patch_size "
                f"{self.temporal_patch_size}."
            )


@strict
class HfvlmImageBindTextConfig(TextConfig):
    """The tower of texts."""

    model_type = "hfvlm_imagebind_text"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6
    projection_dim: int = 1024
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 0


@strict
class HfvlmImageBindAudioConfig(TowerConfig):
    """The tower of audio, over overlapping patches of a spectrogram.

    Args:
        num_mel_bins: rows of the spectrogram.
        num_frames: its columns, 10 ms each.
        patch_size: edge of a patch.
        patch_dropout: share of patches that is left out in training.
        stride: from one patch to the next.
        drop_path_rate: of the last layer, in training; those before it have less.
    """

    model_type = "hfvlm_imagebind_audio"
    base_config_key = "audio_config"

    layer_norm_eps: float = 1e-6
    num_mel_bins: int = 128
    num_frames: int = 204
    patch_size: int = 16
    patch_dropout: float | int = 0.0
    stride: int = 10
    drop_path_rate: float | int = 0.1
    projection_dim: int = 1024

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = ((size - self.patch_size) // self.stride + 1 for size in (self.num_mel_bins, self.num_frames))
        return rows, columns

    def validate_patches(self) -> None:
        if min(self.num_mel_bins, self.num_frames) < self.patch_size:
            raise ValueError(
                f"{type(self).__name__}: a spectrogram of {self.num_mel_bins} x {self.num_frames} is smaller than "
                f"patch_size {self.patch_size}."
            )


@strict
class HfvlmImageBindDepthConfig(VisionConfig):
    """The tower of depth maps. `drop_path_rate` is of the last layer, in training; those before it have less."""

    model_type = "hfvlm_imagebind_depth"
    base_config_key = "depth_config"

    hidden_size: int = 384
    intermediate_size: int = 1536
    num_attention_heads: int = 8
    layer_norm_eps: float = 1e-6
    num_channels: int = 1
    drop_path_rate: float | int = 0.0
    projection_dim: int = 1024


@strict
class HfvlmImageBindThermalConfig(VisionConfig):
    """The tower of thermal images. `drop_path_rate` is of the last layer, in training; those before it have less."""

    model_type = "hfvlm_imagebind_thermal"
    base_config_key = "thermal_config"

    layer_norm_eps: float = 1e-6
    num_channels: int = 1
    drop_path_rate: float | int = 0.0
    projection_dim: int = 1024


@strict
class HfvlmImageBindIMUConfig(TowerConfig):
    """The tower of motion.

    Args:
        num_channels: three of an accelerometer, three of a gyroscope.
        num_samples: of a trace; 5 s at 400 Hz.
        patch_size: samples that make a token.
        patch_dropout: share of tokens that is left out in training.
        drop_path_rate: of the last layer, in training; those before it have less.
        projection_dropout: before the projection, in training.
    """

    model_type = "hfvlm_imagebind_imu"
    base_config_key = "imu_config"

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    layer_norm_eps: float = 1e-6
    num_channels: int = 6
    num_samples: int = 2000
    patch_size: int = 8
    patch_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.7
    projection_dropout: float | int = 0.5
    projection_dim: int = 1024

    @property
    def grid(self) -> tuple[int, int]:
        """One row of patches."""
        return 1, self.num_samples // self.patch_size

    def validate_patches(self) -> None:
        if self.num_samples < self.patch_size:
            raise ValueError(
                f"{type(self).__name__}: num_samples {self.num_samples} is less than patch_size {self.patch_size}."
            )


@strict
class HfvlmImageBindConfig(MultiEncoderConfig):
    """ImageBind. A tower whose configuration is None is not built; see `modalities` of `MultiEncoderConfig`."""

    model_type = "hfvlm_imagebind"
    sub_configs = {
        "vision_config": HfvlmImageBindVisionConfig,
        "text_config": HfvlmImageBindTextConfig,
        "audio_config": HfvlmImageBindAudioConfig,
        "depth_config": HfvlmImageBindDepthConfig,
        "thermal_config": HfvlmImageBindThermalConfig,
        "imu_config": HfvlmImageBindIMUConfig,
    }
    towers = {
        "image": "vision_model",
        "video": "vision_model",
        "text": "text_model",
        "audio": "audio_model",
        "depth": "depth_model",
        "thermal": "thermal_model",
        "imu": "imu_model",
    }

    vision_config: SubConfig[HfvlmImageBindVisionConfig] = field(default_factory=HfvlmImageBindVisionConfig)
    text_config: SubConfig[HfvlmImageBindTextConfig] = field(default_factory=HfvlmImageBindTextConfig)
    audio_config: SubConfig[HfvlmImageBindAudioConfig] = field(default_factory=HfvlmImageBindAudioConfig)
    depth_config: SubConfig[HfvlmImageBindDepthConfig] = field(default_factory=HfvlmImageBindDepthConfig)
    thermal_config: SubConfig[HfvlmImageBindThermalConfig] = field(default_factory=HfvlmImageBindThermalConfig)
    imu_config: SubConfig[HfvlmImageBindIMUConfig] = field(default_factory=HfvlmImageBindIMUConfig)
