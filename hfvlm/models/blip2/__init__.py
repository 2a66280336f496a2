"""BLIP-2 (https://arxiv.org/abs/2301.12597) and InstructBLIP (2305.06500): queries between an image and a language
model."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_blip2": "HfvlmBLIP2Config",
        "hfvlm_blip2_vision": "HfvlmBLIP2VisionConfig",
        "hfvlm_blip2_clip_vision": "HfvlmBLIP2CLIPVisionConfig",
        "hfvlm_blip2_qformer": "HfvlmBLIP2QFormerConfig",
    },
    models={
        "AutoModel": (
            "HfvlmBLIP2ForConditionalGeneration",
            "HfvlmBLIP2T5ForConditionalGeneration",
            "HfvlmBLIP2ForImageTextRetrieval",
            "HfvlmBLIP2ForPreTraining",
            "HfvlmBLIP2VisionModel",
            "HfvlmBLIP2CLIPVisionModel",
            "HfvlmBLIP2QFormerModel",
        ),
        "AutoModelForImageTextToText": (
            "HfvlmBLIP2ForConditionalGeneration",
            "HfvlmBLIP2T5ForConditionalGeneration",
            "HfvlmBLIP2ForPreTraining",
        ),
        "AutoModelForMultimodalLM": (
            "HfvlmBLIP2ForConditionalGeneration",
            "HfvlmBLIP2T5ForConditionalGeneration",
        ),
        "AutoModelForVisualQuestionAnswering": (
            "HfvlmBLIP2ForConditionalGeneration",
            "HfvlmBLIP2T5ForConditionalGeneration",
        ),
        "AutoModelForImageClassification": ("HfvlmBLIP2ForImageClassification",),
        "AutoModelForZeroShotImageClassification": ("HfvlmBLIP2ForImageTextRetrieval", "HfvlmBLIP2ForPreTraining"),
        "AutoModelForPreTraining": ("HfvlmBLIP2ForPreTraining",),
    },
    processor="HfvlmBLIP2Processor",
    processors=("HfvlmInstructBLIPProcessor", "HfvlmBLIP2RetrievalProcessor"),
    image_processors=("HfvlmBLIP2ImageProcessor",),
    tokenizers=("HfvlmBLIP2Tokenizer", "HfvlmBLIP2QFormerTokenizer"),
    lora=("q_proj", "k_proj", "v_proj", "q", "k", "v"),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
