"""Video-ChatGPT's sizes. Defaults are those of the released 7B."""

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


def vicuna_config() -> LlamaConfig:
    """Vicuna 7B v1.1, LLaVA's three tokens, and the three around films."""
    return LlamaConfig(vocab_size=32006, rms_norm_eps=1e-6, pad_token_id=0)


@strict
class HfvlmVideoChatGPTConfig(HfvlmConfig):
    """Video-ChatGPT.

    Args:
        vision_config: of the CLIP tower, which reads every frame.
        text_config: of any language model of transformers.
        video_token_id: the placeholder, of which each film takes as many as it has tokens.
        vision_feature_layer: which of the tower's hidden states is read; -2 is the output of the last layer but one.
        temporal_tokens: tokens for frames, one each; films of fewer frames have zeros in the places of the others.
        projector_depth: linear layers between tower and language model.
    """

    model_type = "hfvlm_video_chatgpt"
    sub_configs = {"vision_config": HfvlmCLIPVisionConfig, "text_config": LlamaConfig}

    vision_config: SubConfig[HfvlmCLIPVisionConfig] = field(default_factory=small_vision_config)
    text_config: SubConfig[Any] = field(default_factory=vicuna_config)
    video_token_id: int = 32003
    vision_feature_layer: int = -2
    temporal_tokens: int = 100
    projector_depth: int = 1

    def count_tokens(self, num_frames: int) -> int:
        """Placeholders of a film of so many frames."""
        rows, columns = self.vision_config.grid
        return max(num_frames, self.temporal_tokens) + rows * columns

    def validate_projector(self) -> None:
        vision, text = self.vision_config.hidden_size, self.text_config.hidden_size
        if self.projector_depth == 0 and vision != text:
            raise ValueError(
                f"projector_depth is 0, but vision_config.hidden_size {vision} is not text_config.hidden_size {text}."
            )

    def validate_layer(self) -> None:
        self.vision_config.check_layer(self.vision_feature_layer)

    def validate_temporal_tokens(self) -> None:
        if self.temporal_tokens < 0:
            raise ValueError(f"temporal_tokens {self.temporal_tokens} is no number of tokens.")
