"""Shikra (https://arxiv.org/abs/2306.15195): a language model that predicts regions of images as numbers."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={"hfvlm_shikra": "HfvlmShikraConfig"},
    models={
        "AutoModel": ("HfvlmShikraForConditionalGeneration",),
        "AutoModelForImageTextToText": ("HfvlmShikraForConditionalGeneration",),
        "AutoModelForMultimodalLM": ("HfvlmShikraForConditionalGeneration",),
        "AutoModelForSequenceClassification": ("HfvlmShikraForSequenceClassification",),
    },
    processor="HfvlmShikraProcessor",
    image_processors=("HfvlmShikraImageProcessor",),
    tokenizers=("HfvlmShikraTokenizer",),
    lora=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
