"""MERLOT Reserve (https://arxiv.org/abs/2201.02639): frames, text and audio of videos in one encoder."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_merlot_reserve": "HfvlmMERLOTReserveConfig",
        "hfvlm_merlot_reserve_vision": "HfvlmMERLOTReserveVisionConfig",
        "hfvlm_merlot_reserve_audio": "HfvlmMERLOTReserveAudioConfig",
    },
    models={
        "AutoModel": (
            "HfvlmMERLOTReserveModel",
            "HfvlmMERLOTReserveForPreTraining",
            "HfvlmMERLOTReserveForMultipleChoice",
            "HfvlmMERLOTReserveForVideoMultipleChoice",
            "HfvlmMERLOTReserveVisionModel",
            "HfvlmMERLOTReserveAudioModel",
        ),
        "AutoModelForImageClassification": ("HfvlmMERLOTReserveForImageClassification",),
        "AutoModelForPreTraining": ("HfvlmMERLOTReserveForPreTraining",),
        "AutoModelForMultipleChoice": (
            "HfvlmMERLOTReserveForMultipleChoice",
            "HfvlmMERLOTReserveForVideoMultipleChoice",
        ),
    },
    processor="HfvlmMERLOTReserveProcessor",
    image_processors=("HfvlmMERLOTReserveImageProcessor",),
    tokenizers=("HfvlmMERLOTReserveTokenizer",),
    feature_extractors=("HfvlmMERLOTReserveFeatureExtractor",),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
