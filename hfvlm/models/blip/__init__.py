"""BLIP (https://arxiv.org/abs/2201.12086): encodes, matches and captions with one text transformer."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_blip": "HfvlmBLIPConfig",
        "hfvlm_blip_vision": "HfvlmBLIPVisionConfig",
        "hfvlm_blip_text": "HfvlmBLIPTextConfig",
    },
    models={
        "AutoModel": (
            "HfvlmBLIPModel",
            "HfvlmBLIPForConditionalGeneration",
            "HfvlmBLIPForQuestionAnswering",
            "HfvlmBLIPForImageTextRetrieval",
            "HfvlmBLIPForVisualReasoning",
            "HfvlmBLIPForRetrievalTraining",
            "HfvlmBLIPForPreTraining",
            "HfvlmBLIPVisionModel",
            "HfvlmBLIPTextModel",
        ),
        "AutoModelForCausalLM": ("HfvlmBLIPTextDecoder",),
        "AutoModelForImageTextToText": ("HfvlmBLIPForConditionalGeneration", "HfvlmBLIPForQuestionAnswering"),
        "AutoModelForMultimodalLM": ("HfvlmBLIPForConditionalGeneration", "HfvlmBLIPForQuestionAnswering"),
        "AutoModelForVisualQuestionAnswering": ("HfvlmBLIPForQuestionAnswering",),
        "AutoModelForImageClassification": ("HfvlmBLIPForImageClassification",),
        "AutoModelForZeroShotImageClassification": ("HfvlmBLIPModel", "HfvlmBLIPForImageTextRetrieval"),
        "AutoModelForPreTraining": ("HfvlmBLIPForPreTraining",),
    },
    processor="HfvlmBLIPProcessor",
    image_processors=("HfvlmBLIPImageProcessor",),
    tokenizers=("HfvlmBLIPTokenizer",),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
