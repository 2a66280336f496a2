"""LanguageBind's sizes. Defaults are those of its releases around ViT-L/14."""

from dataclasses import field

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import MultiEncoderConfig, SubConfig
from hfvlm.models.clip.configuration_clip import HfvlmCLIPTextConfig, HfvlmCLIPVisionConfig


@strict
class HfvlmLanguageBindVisionConfig(HfvlmCLIPVisionConfig):
    """The tower of images: CLIP's."""

    model_type = "hfvlm_languagebind_vision"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "gelu"
    patch_size: int = 14
    projection_dim: int | None = 768


@strict
class HfvlmLanguageBindVideoConfig(HfvlmLanguageBindVisionConfig):
    """The tower of videos.

    Args:
        num_frames: of a video.
        num_class_tokens: 1, which all frames share, or one for each frame, as V1.5 has.
    """

    model_type = "hfvlm_languagebind_video"
    base_config_key = "video_config"

    num_frames: int = 8
    num_class_tokens: int = 1

    def validate_class_tokens(self) -> None:
        if self.num_class_tokens not in (1, self.num_frames):
            raise ValueError(
                f"{type(self).__name__}: num_class_tokens {self.num_class_tokens} must be 1 or num_frames, "
                f"{self.num_frames}."
            )


@strict
class HfvlmLanguageBindTextConfig(HfvlmCLIPTextConfig):
    """The tower of texts: CLIP's."""

    model_type = "hfvlm_languagebind_text"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    projection_dim: int | None = 768


@strict
class HfvlmLanguageBindAudioConfig(HfvlmLanguageBindVisionConfig):
    """The tower of audio, whose spectrograms are its images: `image_size` is mel bins and columns of 10 ms, and the
    channels are three pieces of an audio clip."""

    model_type = "hfvlm_languagebind_audio"
    base_config_key = "audio_config"

    image_size: int | list[int] | tuple[int, int] = (112, 1036)


@strict
class HfvlmLanguageBindDepthConfig(HfvlmLanguageBindVisionConfig):
    """The tower of depth maps, in three equal channels."""

    model_type = "hfvlm_languagebind_depth"
    base_config_key = "depth_config"


@strict
class HfvlmLanguageBindThermalConfig(HfvlmLanguageBindVisionConfig):
    """The tower of thermal images, in three channels."""

    model_type = "hfvlm_languagebind_thermal"
    base_config_key = "thermal_config"


@strict
class HfvlmLanguageBindConfig(MultiEncoderConfig):
    """LanguageBind. A tower whose configuration is None is not built; see `modalities` of `MultiEncoderConfig`.

    Args:
        logit_scale_init_value: the logarithm that each modality's scale begins with.
    """

    model_type = "hfvlm_languagebind"
    sub_configs = {
        "vision_config": HfvlmLanguageBindVisionConfig,
        "video_config": HfvlmLanguageBindVideoConfig,
        "text_config": HfvlmLanguageBindTextConfig,
        "audio_config": HfvlmLanguageBindAudioConfig,
        "depth_config": HfvlmLanguageBindDepthConfig,
        "thermal_config": HfvlmLanguageBindThermalConfig,
    }
    towers = {
        "image": "vision_model",
        "video": "video_model",
        "text": "text_model",
        "audio": "audio_model",
        "depth": "depth_model",
        "thermal": "thermal_model",
    }

    vision_config: SubConfig[HfvlmLanguageBindVisionConfig] = field(default_factory=HfvlmLanguageBindVisionConfig)
    video_config: SubConfig[HfvlmLanguageBindVideoConfig] = field(default_factory=HfvlmLanguageBindVideoConfig)
    text_config: SubConfig[HfvlmLanguageBindTextConfig] = field(default_factory=HfvlmLanguageBindTextConfig)
    audio_config: SubConfig[HfvlmLanguageBindAudioConfig] = field(default_factory=HfvlmLanguageBindAudioConfig)
    depth_config: SubConfig[HfvlmLanguageBindDepthConfig] = field(default_factory=HfvlmLanguageBindDepthConfig)
    thermal_config: SubConfig[HfvlmLanguageBindThermalConfig] = field(default_factory=HfvlmLanguageBindThermalConfig)
    logit_scale_init_value: float = 2.6592
