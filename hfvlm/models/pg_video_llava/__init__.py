"""PG-Video-LLaVA (https://arxiv.org/abs/2311.13435): Video-ChatGPT on LLaVA-1.5, which also takes transcripts."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={"hfvlm_pg_video_llava": "HfvlmPGVideoLLaVAConfig"},
    models={
        "AutoModel": ("HfvlmPGVideoLLaVAForConditionalGeneration",),
        "AutoModelForImageTextToText": ("HfvlmPGVideoLLaVAForConditionalGeneration",),
        "AutoModelForMultimodalLM": ("HfvlmPGVideoLLaVAForConditionalGeneration",),
        "AutoModelForSequenceClassification": ("HfvlmPGVideoLLaVAForSequenceClassification",),
    },
    processor="HfvlmPGVideoLLaVAProcessor",
    tokenizers=("HfvlmPGVideoLLaVATokenizer",),
    feature_extractors=("HfvlmPGVideoLLaVAFeatureExtractor",),
    lora=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
