"""Video-ChatGPT's sizes. Defaults are those of the released 7B."""

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


def vicuna_config() -> LlamaConfig:
    """Return Vicuna 7B v1.1 with LLaVA's three tokens, and the three around videos."""
    return LlamaConfig(vocab_size=32006, rms_norm_eps=1e-6, pad_token_id=0)


@strict
class HfvlmVideoChatGPTConfig(ProjectedConfig):
    """Video-ChatGPT.

    Args:
        vision_config: of the CLIP tower, whose inputs are single frames.
        text_config: of any language model of transformers.
        video_token_id: the placeholder, of which each video takes as many as it has tokens.
        vision_feature_layer: which of the tower's hidden states is projected; -2 is the output of the last layer but
            one.
        temporal_tokens: tokens for frames, one each; videos of fewer frames have zeros for the others.
        projector_depth: linear layers between tower and language model.
    """

    model_type = "hfvlm_video_chatgpt"
    token_count_fields = ("vision_config.image_size", "vision_config.patch_size", "temporal_tokens")

    vision_config: SubConfig[HfvlmCLIPVisionConfig] = field(default_factory=small_vision_config)
    text_config: SubConfig[Any] = field(default_factory=vicuna_config)
    video_token_id: int = 32003
    temporal_tokens: int = 100
    projector_depth: int = 1

    def count_tokens(self, num_frames: int) -> int:
        """Count the placeholders of a video of `num_frames` frames."""
        return count_tokens(num_frames, self.vision_config.grid, self.temporal_tokens)

    def validate_temporal_tokens(self) -> None:
        if self.temporal_tokens < 0:
            raise ValueError(f"temporal_tokens {self.temporal_tokens} is no number of tokens.")


def count_tokens(num_frames: int, grid: tuple[int, int], temporal_tokens: int) -> int:
    """Count the tokens of a video whose frames have a grid of patches, (rows, columns)."""
    return max(num_frames, temporal_tokens) + grid[0] * grid[1]
