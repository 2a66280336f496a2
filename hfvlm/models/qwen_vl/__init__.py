"""Qwen-VL (https://arxiv.org/abs/2308.12966): a language model that predicts regions of what it names in images."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_qwen_vl": "HfvlmQwenVLConfig",
        "hfvlm_qwen_vl_vision": "HfvlmQwenVLVisionConfig",
        "hfvlm_qwen_vl_resampler": "HfvlmQwenVLResamplerConfig",
        "hfvlm_qwen_vl_text": "HfvlmQwenVLTextConfig",
    },
    models={
        "AutoModel": (
            "HfvlmQwenVLForConditionalGeneration",
            "HfvlmQwenVLVisionModel",
            "HfvlmQwenVLResampler",
            "HfvlmQwenVLTextModel",
        ),
        "AutoModelForCausalLM": ("HfvlmQwenVLForCausalLM",),
        "AutoModelForImageClassification": ("HfvlmQwenVLForImageClassification",),
        "AutoModelForImageTextToText": ("HfvlmQwenVLForConditionalGeneration",),
        "AutoModelForMultimodalLM": ("HfvlmQwenVLForConditionalGeneration",),
        "AutoModelForSequenceClassification": ("HfvlmQwenVLForSequenceClassification",),
    },
    processor="HfvlmQwenVLProcessor",
    image_processors=("HfvlmQwenVLImageProcessor",),
    tokenizers=("HfvlmQwenVLTokenizer",),
    # What the authors' own fine-tuning adapts: their c_attn, attn.c_proj, w1 and w2.
    lora=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
