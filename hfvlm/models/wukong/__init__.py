"""Wukong (https://arxiv.org/abs/2202.06767): Chinese CLIP, FILIP and Wukong, as FILIP's authors released them."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_wukong": "HfvlmWukongConfig",
        "hfvlm_wukong_clip": "HfvlmWukongCLIPConfig",
        "hfvlm_wukong_vision": "HfvlmWukongVisionConfig",
        "hfvlm_wukong_trunk": "HfvlmWukongTrunkConfig",
        "hfvlm_wukong_text": "HfvlmWukongTextConfig",
        "hfvlm_wukong_clip_text": "HfvlmWukongCLIPTextConfig",
    },
    models={
        "AutoModel": (
            "HfvlmWukongModel",
            "HfvlmWukongCLIPModel",
            "HfvlmWukongVisionModel",
            "HfvlmWukongTrunkModel",
            "HfvlmWukongTextModel",
            "HfvlmWukongCLIPTextModel",
        ),
        "AutoModelForZeroShotImageClassification": ("HfvlmWukongModel", "HfvlmWukongCLIPModel"),
        "AutoModelForImageClassification": (
            "HfvlmWukongForImageClassification",
            "HfvlmWukongCLIPForImageClassification",
        ),
    },
    processor="HfvlmWukongProcessor",
    image_processors=("HfvlmWukongImageProcessor",),
    tokenizers=("HfvlmWukongTokenizer",),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
