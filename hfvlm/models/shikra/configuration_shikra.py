"""Shikra's sizes. Defaults are those of the released 7B."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from hfvlm.configuration import SubConfig
from hfvlm.models.clip.configuration_clip import HfvlmCLIPVisionConfig
from hfvlm.models.llava.configuration_llava import ProjectedConfig, openai_vision_config


def small_vision_config() -> HfvlmCLIPVisionConfig:
    """Return CLIP's ViT-L/14 at 224 pixels."""
    return openai_vision_config(224)


def llama_config() -> LlamaConfig:
    """Return LLaMA 7B with the three tokens of images."""
    return LlamaConfig(vocab_size=32003, rms_norm_eps=1e-6, pad_token_id=0)


@strict
class HfvlmShikraConfig(ProjectedConfig):
    """Shikra.

    Args:
        vision_config: of the CLIP tower.
        text_config: of any language model of transformers.
        image_token_id: the placeholder, of which each image takes as many as it has patches.
        vision_feature_layer: which of the tower's hidden states is projected; -2 is the output of the last layer but
            one.
    """

    model_type = "hfvlm_shikra"
    token_count_fields = ("vision_config.image_size", "vision_config.patch_size")

    vision_config: SubConfig[HfvlmCLIPVisionConfig] = field(default_factory=small_vision_config)
    text_config: SubConfig[Any] = field(default_factory=llama_config)
    image_token_id: int = 32000

    def count_tokens(self) -> int:
        """Count the placeholders of an image."""
        return self.vision_config.patch_count
