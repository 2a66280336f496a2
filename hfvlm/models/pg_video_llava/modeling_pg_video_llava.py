"""PG-Video-LLaVA (https://arxiv.org/abs/2311.13435; github.com/mbzuai-oryx/Video-LLaVA at 0c8810f)."""

from hfvlm.modeling.scoring import TextScorer
from hfvlm.models.pg_video_llava.configuration_pg_video_llava import HfvlmPGVideoLLaVAConfig
from hfvlm.models.video_chatgpt.modeling_video_chatgpt import HfvlmVideoChatGPTForConditionalGeneration


class HfvlmPGVideoLLaVAForConditionalGeneration(HfvlmVideoChatGPTForConditionalGeneration):
    """Video-ChatGPT at other sizes; speech in a video is part of the text."""

    config: HfvlmPGVideoLLaVAConfig


class HfvlmPGVideoLLaVAForSequenceClassification(TextScorer, HfvlmPGVideoLLaVAForConditionalGeneration):
    """A reward, or other scores, of answers about videos."""
