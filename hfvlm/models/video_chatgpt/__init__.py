"""Video-ChatGPT (https://arxiv.org/abs/2306.05424): a language model that attends to averages of a video's patches."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={"hfvlm_video_chatgpt": "HfvlmVideoChatGPTConfig"},
    models={
        "AutoModel": ("HfvlmVideoChatGPTForConditionalGeneration",),
        "AutoModelForImageTextToText": ("HfvlmVideoChatGPTForConditionalGeneration",),
        "AutoModelForMultimodalLM": ("HfvlmVideoChatGPTForConditionalGeneration",),
        "AutoModelForSequenceClassification": ("HfvlmVideoChatGPTForSequenceClassification",),
    },
    processor="HfvlmVideoChatGPTProcessor",
    tokenizers=("HfvlmVideoChatGPTTokenizer",),
    feature_extractors=("HfvlmVideoChatGPTFeatureExtractor",),
    lora=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
