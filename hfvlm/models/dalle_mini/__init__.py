"""DALL-E mini and mega (https://github.com/borisdayma/dalle-mini): texts to images, by the codes of a VQGAN."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_dalle_mini": "HfvlmDALLEMiniConfig",
        "hfvlm_dalle_mini_text": "HfvlmDALLEMiniTextConfig",
        "hfvlm_dalle_mini_decoder": "HfvlmDALLEMiniDecoderConfig",
        "hfvlm_dalle_mini_vqgan": "HfvlmDALLEMiniVQGANConfig",
        "hfvlm_dalle_mini_dvae": "HfvlmDALLEMiniDVAEConfig",
    },
    models={
        "AutoModel": (
            "HfvlmDALLEMiniForConditionalGeneration",
            "HfvlmDALLEMiniTextModel",
            "HfvlmDALLEMiniVQGANModel",
            "HfvlmDALLEMiniDVAEModel",
        ),
        "AutoModelForCausalLM": ("HfvlmDALLEMiniDecoder",),
        "AutoModelForMultimodalLM": ("HfvlmDALLEMiniForConditionalGeneration",),
    },
    processor="HfvlmDALLEMiniProcessor",
    image_processors=("HfvlmDALLEMiniImageProcessor",),
    tokenizers=("HfvlmDALLEMiniTokenizer",),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
