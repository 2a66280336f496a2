"""MaMMUT (https://arxiv.org/abs/2303.16839): one text decoder in two passes, a contrastive and a generative."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_mammut": "HfvlmMaMMUTConfig",
        "hfvlm_mammut_vision": "HfvlmMaMMUTVisionConfig",
        "hfvlm_mammut_text": "HfvlmMaMMUTTextConfig",
    },
    models={
        "AutoModel": ("HfvlmMaMMUTModel", "HfvlmMaMMUTVisionModel", "HfvlmMaMMUTTextModel"),
        "AutoModelForCausalLM": ("HfvlmMaMMUTTextModel",),
        "AutoModelForImageTextToText": ("HfvlmMaMMUTModel",),
        "AutoModelForMultimodalLM": ("HfvlmMaMMUTModel",),
        "AutoModelForImageClassification": ("HfvlmMaMMUTForImageClassification",),
        "AutoModelForZeroShotImageClassification": ("HfvlmMaMMUTModel",),
    },
    processor="HfvlmMaMMUTProcessor",
    image_processors=("HfvlmMaMMUTImageProcessor",),
    tokenizers=("HfvlmMaMMUTTokenizer",),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
