"""PaLI (https://arxiv.org/abs/2209.06794): a ViT's patches and a text in mT5's encoder; its decoder answers."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={"hfvlm_pali": "HfvlmPaLIConfig"},
    models={
        "AutoModel": ("HfvlmPaLIForConditionalGeneration",),
        "AutoModelForImageTextToText": ("HfvlmPaLIForConditionalGeneration",),
        "AutoModelForMultimodalLM": ("HfvlmPaLIForConditionalGeneration",),
    },
    processor="HfvlmPaLIProcessor",
    image_processors=("HfvlmPaLIImageProcessor",),
    tokenizers=("HfvlmPaLITokenizer",),
    lora=("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
