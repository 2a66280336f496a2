"""ImageBind (https://arxiv.org/abs/2305.05665): six modalities in one space, each bound to it by pairs with images."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_imagebind": "HfvlmImageBindConfig",
        "hfvlm_imagebind_vision": "HfvlmImageBindVisionConfig",
        "hfvlm_imagebind_text": "HfvlmImageBindTextConfig",
        "hfvlm_imagebind_audio": "HfvlmImageBindAudioConfig",
        "hfvlm_imagebind_depth": "HfvlmImageBindDepthConfig",
        "hfvlm_imagebind_thermal": "HfvlmImageBindThermalConfig",
        "hfvlm_imagebind_imu": "HfvlmImageBindIMUConfig",
    },
    models={
        "AutoModel": (
            "HfvlmImageBindModel",
            "HfvlmImageBindVisionModel",
            "HfvlmImageBindTextModel",
            "HfvlmImageBindAudioModel",
            "HfvlmImageBindDepthModel",
            "HfvlmImageBindThermalModel",
            "HfvlmImageBindIMUModel",
        ),
        "AutoModelForImageClassification": ("HfvlmImageBindForImageClassification",),
        "AutoModelForZeroShotImageClassification": ("HfvlmImageBindModel",),
    },
    processor="HfvlmImageBindProcessor",
    image_processors=("HfvlmImageBindImageProcessor",),
    tokenizers=("HfvlmImageBindTokenizer",),
    feature_extractors=(
        "HfvlmImageBindFeatureExtractor",
        "HfvlmImageBindVideoFeatureExtractor",
        "HfvlmImageBindDepthFeatureExtractor",
        "HfvlmImageBindThermalFeatureExtractor",
        "HfvlmImageBindIMUFeatureExtractor",
    ),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
