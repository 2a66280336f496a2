"""Inputs of PG-Video-LLaVA (https://github.com/mbzuai-oryx/Video-LLaVA at 0c8810f)."""

from hfvlm.models.pg_video_llava.conversations import CONVERSATIONS
from hfvlm.models.video_chatgpt.processing_video_chatgpt import (
    HfvlmVideoChatGPTFeatureExtractor,
    HfvlmVideoChatGPTProcessor,
)
from hfvlm.processing.tokenization import PieceTokenizer


class HfvlmPGVideoLLaVAFeatureExtractor(HfvlmVideoChatGPTFeatureExtractor):
    """Videos as Video-ChatGPT's, at 336 pixels."""

    size: dict[str, int] = {"height": 336, "width": 336}


class HfvlmPGVideoLLaVATokenizer(PieceTokenizer):
    """The language model's own, with a placeholder for videos and tokens around them."""


class HfvlmPGVideoLLaVAProcessor(HfvlmVideoChatGPTProcessor):
    """Conversations about videos and their transcripts: `{"type": "transcript", "text": "..."}` in a message."""

    conversations = CONVERSATIONS
    default_conversation = "pg-video-llava"
