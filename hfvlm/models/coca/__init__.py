"""CoCa (https://arxiv.org/abs/2205.01917): images and texts in one space, and captions, from the same weights."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_coca": "HfvlmCoCaConfig",
        "hfvlm_coca_vision": "HfvlmCoCaVisionConfig",
        "hfvlm_coca_text": "HfvlmCoCaTextConfig",
    },
    models={
        "AutoModel": ("HfvlmCoCaModel", "HfvlmCoCaVisionModel", "HfvlmCoCaTextModel"),
        "AutoModelForCausalLM": ("HfvlmCoCaTextModel",),
        "AutoModelForImageTextToText": ("HfvlmCoCaModel",),
        "AutoModelForMultimodalLM": ("HfvlmCoCaModel",),
        "AutoModelForImageClassification": ("HfvlmCoCaForImageClassification",),
        "AutoModelForZeroShotImageClassification": ("HfvlmCoCaModel",),
    },
    processor="HfvlmCoCaProcessor",
    image_processors=("HfvlmCoCaImageProcessor",),
    tokenizers=("HfvlmCoCaTokenizer",),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
