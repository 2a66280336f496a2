"""PaliGemma and PaliGemma 2 (https://arxiv.org/abs/2407.07726, 2412.03555): Gemma on SigLIP's patches, a prefix-LM."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_paligemma": "HfvlmPaliGemmaConfig",
        "hfvlm_paligemma_vision": "HfvlmPaliGemmaVisionConfig",
        "hfvlm_paligemma_mask": "HfvlmPaliGemmaMaskConfig",
    },
    models={
        "AutoModel": (
            "HfvlmPaliGemmaForConditionalGeneration",
            "HfvlmPaliGemmaVisionModel",
            "HfvlmPaliGemmaMaskModel",
        ),
        "AutoModelForImageClassification": ("HfvlmPaliGemmaForImageClassification",),
        "AutoModelForImageTextToText": ("HfvlmPaliGemmaForConditionalGeneration",),
        "AutoModelForMultimodalLM": ("HfvlmPaliGemmaForConditionalGeneration",),
    },
    processor="HfvlmPaliGemmaProcessor",
    image_processors=("HfvlmPaliGemmaImageProcessor",),
    tokenizers=("HfvlmPaliGemmaTokenizer",),
    lora=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
