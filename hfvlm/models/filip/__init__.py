"""FILIP (https://arxiv.org/abs/2111.07783) as DeCLIP reproduced it: images and texts compared token by token."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_filip": "HfvlmFILIPConfig",
        "hfvlm_filip_vision": "HfvlmFILIPVisionConfig",
        "hfvlm_filip_text": "HfvlmFILIPTextConfig",
    },
    models={
        "AutoModel": ("HfvlmFILIPModel", "HfvlmFILIPVisionModel", "HfvlmFILIPTextModel"),
        "AutoModelForZeroShotImageClassification": ("HfvlmFILIPModel",),
        "AutoModelForImageClassification": ("HfvlmFILIPForImageClassification",),
    },
    processor="HfvlmFILIPProcessor",
    image_processors=("HfvlmFILIPImageProcessor",),
    tokenizers=("HfvlmFILIPTokenizer",),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
