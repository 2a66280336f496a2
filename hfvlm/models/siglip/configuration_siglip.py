"""SigLIP's sizes. Defaults are those of SigLIP ViT-B/16 at 224 px."""

from dataclasses import field
from math import isqrt
from typing import Any

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import HfvlmConfig, SubConfig, TextConfig, TowerConfig, VisionConfig, joint_size
from hfvlm.modeling.trunks import HfvlmTextTrunkConfig, HfvlmVisionTrunkConfig


@strict
class HfvlmSigLIPVisionConfig(VisionConfig):
    """The vision transformer for images of one size."""

    model_type = "hfvlm_siglip_vision"

    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6


@strict
class HfvlmSigLIPNaFlexVisionConfig(TowerConfig):
    """The vision transformer for images of any size and aspect ratio (SigLIP 2 NaFlex).

    `num_patches` is the size of the square position table, which is resized to each image's grid.
    """

    model_type = "hfvlm_siglip_naflex_vision"
    base_config_key = "vision_config"

    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    patch_size: int = 16
    num_channels: int = 3
    num_patches: int = 256

    def validate_table(self) -> None:
        if isqrt(self.num_patches) ** 2 != self.num_patches:
            raise ValueError(f"{type(self).__name__}: num_patches {self.num_patches} is not the square of an integer.")


@strict
class HfvlmSigLIPTextConfig(TextConfig):
    """The text transformer. `projection_dim` None leaves the head out, as in So400m-i18n."""

    model_type = "hfvlm_siglip_text"

    vocab_size: int = 32000
    max_position_embeddings: int = 64
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    projection_dim: int | None = 768
    pad_token_id: int | None = 1
    eos_token_id: int | None = 1


@strict
class HfvlmSigLIPConfig(HfvlmConfig):
    """SigLIP and SigLIP 2. The classes of `vision_config` and `text_config` decide which towers are built;
    configurations of transformers' own models make these the towers, as in NLLB-SigLIP."""

    model_type = "hfvlm_siglip"
    sub_configs = {"vision_config": HfvlmSigLIPVisionConfig, "text_config": HfvlmSigLIPTextConfig}
    trunks = {"vision_config": HfvlmVisionTrunkConfig, "text_config": HfvlmTextTrunkConfig}

    vision_config: SubConfig[Any] = field(default_factory=HfvlmSigLIPVisionConfig)
    text_config: SubConfig[Any] = field(default_factory=HfvlmSigLIPTextConfig)
    logit_scale_init_value: float = 2.3026
    logit_bias_init_value: float = -10.0

    def validate_joint_space(self) -> None:
        image, text = joint_size(self.vision_config), joint_size(self.text_config)
        if image != text:
            raise ValueError(
                f"The embeddings' widths differ: hidden_size {image} in vision_config, projection_dim (or "
                f"hidden_size) {text} in text_config."
            )
