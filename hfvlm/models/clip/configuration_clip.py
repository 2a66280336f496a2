"""CLIP's sizes. Defaults are those of OpenAI's ViT-B/32."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import DualEncoderConfig, HfvlmConfig, SubConfig, TextConfig, VisionConfig
from hfvlm.modeling.trunks import HfvlmTextTrunkConfig, HfvlmVisionTrunkConfig


@strict
class HfvlmCLIPVisionConfig(VisionConfig):
    """The vision transformer. `projection_dim` is the width of the joint space; None leaves the projection out."""

    model_type = "hfvlm_clip_vision"

    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    projection_dim: int | None = 512


@strict
class HfvlmCLIPResNetConfig(HfvlmConfig):
    """The modified ResNet. `stem_size` is the stem's output width, a quarter of the first stage's."""

    model_type = "hfvlm_clip_resnet"
    base_config_key = "vision_config"

    image_size: int = 224
    num_channels: int = 3
    stem_size: int = 64
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    projection_dim: int = 1024
    num_attention_heads: int = 32
    attention_dropout: float | int = 0.0

    @property
    def hidden_size(self) -> int:
        """Width of the last stage, the input of the attention pool."""
        return self.stem_size * 32

    @property
    def pooled_size(self) -> int:
        """Width of the pooled output that a classifier takes: the attention pool ends in the joint space."""
        return self.projection_dim

    def validate_stages(self) -> None:
        if len(self.depths) != 4:
            raise ValueError(f"{type(self).__name__}: depths {self.depths} must name the blocks of four stages.")
        if self.image_size % 32:
            raise ValueError(
                f"{type(self).__name__}: image_size {self.image_size} is not a multiple of 32, the stride."
            )


@strict
class HfvlmCLIPTextConfig(TextConfig):
    """The text transformer."""

    model_type = "hfvlm_clip_text"

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    projection_dim: int | None = 512
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 49407


@strict
class HfvlmCLIPConfig(DualEncoderConfig):
    """CLIP. The classes of `vision_config` and `text_config` decide which towers are built; configurations of
    transformers' own models make these the towers."""

    model_type = "hfvlm_clip"
    sub_configs = {"vision_config": HfvlmCLIPVisionConfig, "text_config": HfvlmCLIPTextConfig}
    trunks = {"vision_config": HfvlmVisionTrunkConfig, "text_config": HfvlmTextTrunkConfig}

    vision_config: SubConfig[Any] = field(default_factory=HfvlmCLIPVisionConfig)
    text_config: SubConfig[Any] = field(default_factory=HfvlmCLIPTextConfig)
