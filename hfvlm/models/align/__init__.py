"""ALIGN (https://arxiv.org/abs/2102.05918): images and texts in one space, with an EfficientNet and a BERT."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_align": "HfvlmALIGNConfig",
        "hfvlm_align_vision": "HfvlmALIGNVisionConfig",
        "hfvlm_align_text": "HfvlmALIGNTextConfig",
    },
    models={
        "AutoModel": ("HfvlmALIGNModel", "HfvlmALIGNVisionModel", "HfvlmALIGNTextModel"),
        "AutoModelForZeroShotImageClassification": ("HfvlmALIGNModel",),
        "AutoModelForImageClassification": ("HfvlmALIGNForImageClassification",),
    },
    processor="HfvlmALIGNProcessor",
    image_processors=("HfvlmALIGNImageProcessor",),
    tokenizers=("HfvlmALIGNTokenizer",),
    # An EfficientNet has no attention but that to its channels.
    lora=("q_proj", "v_proj", "excite.fc1", "excite.fc2"),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
