"""LLaVA (https://arxiv.org/abs/2304.08485): a language model on CLIP's patches; v1, v1.5 and v1.6 (NeXT)."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={"hfvlm_llava": "HfvlmLLaVAConfig"},
    models={
        "AutoModel": ("HfvlmLLaVAForConditionalGeneration",),
        "AutoModelForImageTextToText": ("HfvlmLLaVAForConditionalGeneration",),
        "AutoModelForMultimodalLM": ("HfvlmLLaVAForConditionalGeneration",),
        "AutoModelForSequenceClassification": ("HfvlmLLaVAForSequenceClassification",),
    },
    processor="HfvlmLLaVAProcessor",
    image_processors=("HfvlmLLaVAImageProcessor",),
    tokenizers=("HfvlmLLaVATokenizer",),
    lora=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
