"""FLAVA (https://arxiv.org/abs/2112.04482): images, texts and both together, with one encoder for each."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_flava": "HfvlmFLAVAConfig",
        "hfvlm_flava_vision": "HfvlmFLAVAVisionConfig",
        "hfvlm_flava_text": "HfvlmFLAVATextConfig",
        "hfvlm_flava_multimodal": "HfvlmFLAVAMultimodalConfig",
        "hfvlm_flava_codebook": "HfvlmFLAVACodebookConfig",
    },
    models={
        "AutoModel": (
            "HfvlmFLAVAModel",
            "HfvlmFLAVAForPreTraining",
            "HfvlmFLAVAForClassification",
            "HfvlmFLAVAVisionModel",
            "HfvlmFLAVATextModel",
            "HfvlmFLAVAMultimodalModel",
            "HfvlmFLAVACodebookModel",
        ),
        "AutoModelForZeroShotImageClassification": ("HfvlmFLAVAModel", "HfvlmFLAVAForPreTraining"),
        "AutoModelForPreTraining": ("HfvlmFLAVAForPreTraining",),
        "AutoModelForImageClassification": ("HfvlmFLAVAForClassification",),
        "AutoModelForSequenceClassification": ("HfvlmFLAVAForClassification",),
    },
    processor="HfvlmFLAVAProcessor",
    image_processors=("HfvlmFLAVAImageProcessor",),
    tokenizers=("HfvlmFLAVATokenizer",),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
