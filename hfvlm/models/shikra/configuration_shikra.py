"""Shikra's sizes. Defaults are those of the released 7B."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from hfvlm.configuration import HfvlmConfig, SubConfig
from hfvlm.models.clip.configuration_clip import HfvlmCLIPVisionConfig
from hfvlm.models.llava.configuration_llava import openai_vision_config


def small_vision_config() -> HfvlmCLIPVisionConfig:
    """CLIP's ViT-L/14 at 224 pixels."""
    return openai_vision_config(224)


def llama_config() -> LlamaConfig:
    """LLaMA 7B, and the three tokens of pictures."""
    return LlamaConfig(vocab_size=32003, rms_norm_eps=1e-6, pad_token_id=0)


@strict
class HfvlmShikraConfig(HfvlmConfig):
    """Shikra.

    Args:
        vision_config: of the CLIP tower.
        text_config: of any language model of transformers.
        image_token_id: the placeholder, of which each picture takes as many as it has patches.
        vision_feature_layer: which of the tower's hidden states is read; -2 is the output of the last layer but one.
    """

    model_type = "hfvlm_shikra"
    sub_configs = {"vision_config": HfvlmCLIPVisionConfig, "text_config": LlamaConfig}

    vision_config: SubConfig[HfvlmCLIPVisionConfig] = field(default_factory=small_vision_config)
    text_config: SubConfig[Any] = field(default_factory=llama_config)
    image_token_id: int = 32000
    vision_feature_layer: int = -2

    def count_tokens(self) -> int:
        """Placeholders of a picture."""
        rows, columns = self.vision_config.grid
        return rows * columns

    def validate_layer(self) -> None:
        self.vision_config.check_layer(self.vision_feature_layer)
