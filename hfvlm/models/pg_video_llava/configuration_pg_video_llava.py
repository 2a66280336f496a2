"""PG-Video-LLaVA's sizes. Defaults are those of the released 7B."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from hfvlm.configuration import SubConfig
from hfvlm.models.clip.configuration_clip import HfvlmCLIPVisionConfig
from hfvlm.models.llava.configuration_llava import openai_vision_config
from hfvlm.models.video_chatgpt.configuration_video_chatgpt import HfvlmVideoChatGPTConfig


def vicuna_config() -> LlamaConfig:
    """Return Vicuna 7B v1.5 with the three tokens of videos."""
    return LlamaConfig(vocab_size=32003, max_position_embeddings=4096, rms_norm_eps=1e-5, pad_token_id=0)


@strict
class HfvlmPGVideoLLaVAConfig(HfvlmVideoChatGPTConfig):
    """Video-ChatGPT's, with CLIP at 336 pixels, LLaVA-1.5's language model and two layers in the projector."""

    model_type = "hfvlm_pg_video_llava"

    vision_config: SubConfig[HfvlmCLIPVisionConfig] = field(default_factory=openai_vision_config)
    text_config: SubConfig[Any] = field(default_factory=vicuna_config)
    video_token_id: int = 32000
    projector_depth: int = 2
