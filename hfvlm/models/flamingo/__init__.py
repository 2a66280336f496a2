"""Flamingo (https://arxiv.org/abs/2204.14198), by OpenFlamingo: a language model that attends to images between its
layers."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_flamingo": "HfvlmFlamingoConfig",
        "hfvlm_flamingo_resampler": "HfvlmFlamingoResamplerConfig",
        "hfvlm_flamingo_mpt": "HfvlmFlamingoMPTConfig",
    },
    models={
        "AutoModel": ("HfvlmFlamingoForConditionalGeneration", "HfvlmFlamingoResampler"),
        "AutoModelForCausalLM": ("HfvlmFlamingoMPTForCausalLM",),
        "AutoModelForImageTextToText": ("HfvlmFlamingoForConditionalGeneration",),
        "AutoModelForMultimodalLM": ("HfvlmFlamingoForConditionalGeneration",),
    },
    processor="HfvlmFlamingoProcessor",
    image_processors=("HfvlmFlamingoImageProcessor",),
    tokenizers=("HfvlmFlamingoTokenizer",),
    lora=(
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("Wqkv", "out_proj", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
