"""SigLIP and SigLIP 2 (https://arxiv.org/abs/2303.15343, https://arxiv.org/abs/2502.14786): CLIP with a sigmoid."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_siglip": "HfvlmSigLIPConfig",
        "hfvlm_siglip_vision": "HfvlmSigLIPVisionConfig",
        "hfvlm_siglip_naflex_vision": "HfvlmSigLIPNaFlexVisionConfig",
        "hfvlm_siglip_text": "HfvlmSigLIPTextConfig",
    },
    models={
        "AutoModel": (
            "HfvlmSigLIPModel",
            "HfvlmSigLIPVisionModel",
            "HfvlmSigLIPNaFlexVisionModel",
            "HfvlmSigLIPTextModel",
        ),
        "AutoModelForZeroShotImageClassification": ("HfvlmSigLIPModel",),
        "AutoModelForImageClassification": ("HfvlmSigLIPForImageClassification",),
    },
    processor="HfvlmSigLIPProcessor",
    image_processors=("HfvlmSigLIPImageProcessor", "HfvlmSigLIPNaFlexImageProcessor"),
    tokenizers=("HfvlmSigLIPTokenizer",),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
