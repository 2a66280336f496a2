"""LanguageBind (https://arxiv.org/abs/2310.01852): five modalities bound to texts, and so to each other."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_languagebind": "HfvlmLanguageBindConfig",
        "hfvlm_languagebind_vision": "HfvlmLanguageBindVisionConfig",
        "hfvlm_languagebind_video": "HfvlmLanguageBindVideoConfig",
        "hfvlm_languagebind_text": "HfvlmLanguageBindTextConfig",
        "hfvlm_languagebind_audio": "HfvlmLanguageBindAudioConfig",
        "hfvlm_languagebind_depth": "HfvlmLanguageBindDepthConfig",
        "hfvlm_languagebind_thermal": "HfvlmLanguageBindThermalConfig",
    },
    models={
        "AutoModel": (
            "HfvlmLanguageBindModel",
            "HfvlmLanguageBindVisionModel",
            "HfvlmLanguageBindVideoModel",
            "HfvlmLanguageBindTextModel",
            "HfvlmLanguageBindAudioModel",
            "HfvlmLanguageBindDepthModel",
            "HfvlmLanguageBindThermalModel",
        ),
        "AutoModelForImageClassification": ("HfvlmLanguageBindForImageClassification",),
        "AutoModelForZeroShotImageClassification": ("HfvlmLanguageBindModel",),
    },
    processor="HfvlmLanguageBindProcessor",
    image_processors=("HfvlmLanguageBindImageProcessor",),
    tokenizers=("HfvlmLanguageBindTokenizer",),
    feature_extractors=(
        "HfvlmLanguageBindFeatureExtractor",
        "HfvlmLanguageBindVideoFeatureExtractor",
        "HfvlmLanguageBindDepthFeatureExtractor",
        "HfvlmLanguageBindThermalFeatureExtractor",
    ),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
