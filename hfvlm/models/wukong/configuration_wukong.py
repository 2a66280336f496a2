"""Wukong's sizes. Defaults are those of the ViT-B/32 of each kind."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import SwinConfig

from hfvlm.configuration import DualEncoderConfig, SubConfig, TextConfig, joint_size
from hfvlm.modeling.trunks import HfvlmVisionTrunkConfig
from hfvlm.models.clip.configuration_clip import HfvlmCLIPVisionConfig


@strict
class HfvlmWukongVisionConfig(HfvlmCLIPVisionConfig):
    """CLIP's vision transformer whose patches enter the joint space, of width `projection_dim`."""

    model_type = "hfvlm_wukong_vision"

    projection_dim: int | None = 256


@strict
class HfvlmWukongTrunkConfig(HfvlmVisionTrunkConfig):
    """A vision model of transformers, as Swin, whose tokens enter the joint space."""

    model_type = "hfvlm_wukong_trunk"
    sub_configs = {"trunk_config": SwinConfig}

    trunk_config: SubConfig[Any] = field(default_factory=SwinConfig)
    pooling: str = "mean"
    projection_dim: int | None = 256
    projection_bias: bool = True


@strict
class HfvlmWukongTextConfig(TextConfig):
    """The text transformer over the vocabulary of the Chinese BERT, whose tokens enter the joint space."""

    model_type = "hfvlm_wukong_text"

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    projection_dim: int | None = 256
    vocab_size: int = 21128
    max_position_embeddings: int = 32
    pad_token_id: int = 0


@strict
class HfvlmWukongCLIPTextConfig(HfvlmWukongTextConfig):
    """The same transformer, of which one token enters the joint space."""

    model_type = "hfvlm_wukong_clip_text"

    projection_dim: int | None = 512


@strict
class HfvlmWukongConfig(DualEncoderConfig):
    """Images and texts that are compared token by token: FILIP and Wukong. The class of `vision_config` decides which
    tower is built.

    Args:
        num_image_tokens: learned sums of the patches that are compared with texts, as in Wukong; None, as in FILIP,
            for the patches themselves.
    """

    model_type = "hfvlm_wukong"
    sub_configs = {"vision_config": HfvlmWukongVisionConfig, "text_config": HfvlmWukongTextConfig}
    trunks = {"vision_config": HfvlmWukongTrunkConfig}

    vision_config: SubConfig[HfvlmWukongVisionConfig | HfvlmWukongTrunkConfig] = field(
        default_factory=HfvlmWukongVisionConfig
    )
    text_config: SubConfig[HfvlmWukongTextConfig] = field(default_factory=HfvlmWukongTextConfig)
    num_image_tokens: int | None = 12

    def validate_reduction(self) -> None:
        width = joint_size(self.vision_config)
        if self.num_image_tokens is not None and width % REDUCTION_GROUPS:
            raise ValueError(
                f"projection_dim is {width}: with num_image_tokens it must be a multiple of {REDUCTION_GROUPS}, the "
                "groups of the reduction's convolutions."
            )


# Of channels, in the convolutions that reduce the tokens.
REDUCTION_GROUPS = 8


@strict
class HfvlmWukongCLIPConfig(DualEncoderConfig):
    """Images and texts as one vector each: CLIP."""

    model_type = "hfvlm_wukong_clip"
    sub_configs = {"vision_config": HfvlmCLIPVisionConfig, "text_config": HfvlmWukongCLIPTextConfig}
    trunks = {"vision_config": HfvlmVisionTrunkConfig}

    vision_config: SubConfig[HfvlmCLIPVisionConfig | HfvlmVisionTrunkConfig] = field(
        default_factory=HfvlmCLIPVisionConfig
    )
    text_config: SubConfig[HfvlmWukongCLIPTextConfig] = field(default_factory=HfvlmWukongCLIPTextConfig)
