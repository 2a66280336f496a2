"""What PG-Video-LLaVA is fed (https://github.com/mbzuai-oryx/Video-LLaVA at 0c8810f)."""

from hfvlm.models.pg_video_llava.conversations import CONVERSATIONS
from hfvlm.models.video_chatgpt.processing_video_chatgpt import (
    HfvlmVideoChatGPTFeatureExtractor,
    HfvlmVideoChatGPTProcessor,
)
from hfvlm.processing.tokenization import PieceTokenizer


class HfvlmPGVideoLLaVAFeatureExtractor(HfvlmVideoChatGPTFeatureExtractor):
    """Films as Video-ChatGPT's, at 336 pixels."""

    size: dict[str, int] = {"height": 336, "width": 336}


class HfvlmPGVideoLLaVATokenizer(PieceTokenizer):
    """The language model's own, with tokens for the places of films and around them."""


class HfvlmPGVideoLLaVAProcessor(HfvlmVideoChatGPTProcessor):
    """Conversations about films, and what is said in them: `{"type": "transcript", "text": "..."}` in a message."""

    conversations = CONVERSATIONS
    default_conversation = "pg-video-llava"
