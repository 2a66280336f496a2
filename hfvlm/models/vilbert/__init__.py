"""ViLBERT (https://arxiv.org/abs/1908.02265) and 12-in-1 (https://arxiv.org/abs/1912.02315): two streams that attend
to each other, one over a text and one over the regions that a detector found in an image."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_vilbert": "HfvlmViLBERTConfig",
        "hfvlm_vilbert_vision": "HfvlmViLBERTVisionConfig",
        "hfvlm_vilbert_text": "HfvlmViLBERTTextConfig",
    },
    models={
        "AutoModel": (
            "HfvlmViLBERTModel",
            "HfvlmViLBERTForPreTraining",
            "HfvlmViLBERTForVisionLanguageTasks",
            "HfvlmViLBERTVisionModel",
            "HfvlmViLBERTTextModel",
        ),
        "AutoModelForPreTraining": ("HfvlmViLBERTForPreTraining",),
        "AutoModelForVisualQuestionAnswering": ("HfvlmViLBERTForVisionLanguageTasks",),
    },
    processor="HfvlmViLBERTProcessor",
    tokenizers=("HfvlmViLBERTTokenizer",),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
