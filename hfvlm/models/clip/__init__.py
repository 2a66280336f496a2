"""CLIP (https://arxiv.org/abs/2103.00020): images and texts in one space, with ViT and ResNet towers."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={
        "hfvlm_clip": "HfvlmCLIPConfig",
        "hfvlm_clip_vision": "HfvlmCLIPVisionConfig",
        "hfvlm_clip_resnet": "HfvlmCLIPResNetConfig",
        "hfvlm_clip_vit": "HfvlmCLIPViTConfig",
        "hfvlm_clip_eva": "HfvlmCLIPEVAConfig",
        "hfvlm_clip_eva_post_norm": "HfvlmCLIPEVAPostNormConfig",
        "hfvlm_clip_eva02": "HfvlmCLIPEVA02Config",
        "hfvlm_clip_pe": "HfvlmCLIPPEConfig",
        "hfvlm_clip_pe_gigantic": "HfvlmCLIPPEGiganticConfig",
        "hfvlm_clip_swin": "HfvlmCLIPSwinConfig",
        "hfvlm_clip_swin_v2": "HfvlmCLIPSwinV2Config",
        "hfvlm_clip_text": "HfvlmCLIPTextConfig",
        "hfvlm_clip_bidirectional_text": "HfvlmCLIPBidirectionalTextConfig",
        "hfvlm_clipa_vision": "HfvlmCLIPAVisionConfig",
        "hfvlm_clipa_text": "HfvlmCLIPATextConfig",
        "hfvlm_metaclip2_text": "HfvlmMetaCLIP2TextConfig",
        "hfvlm_vision_trunk": "HfvlmVisionTrunkConfig",
        "hfvlm_text_trunk": "HfvlmTextTrunkConfig",
        "hfvlm_timm_trunk": "HfvlmTimmTrunkConfig",
    },
    models={
        "AutoModel": (
            *("HfvlmCLIPModel", "HfvlmCLIPVisionModel", "HfvlmCLIPResNetModel", "HfvlmCLIPTextModel"),
            *("HfvlmCLIPViTModel", "HfvlmCLIPEVAModel", "HfvlmCLIPEVAPostNormModel", "HfvlmCLIPEVA02Model"),
            *("HfvlmCLIPPEModel", "HfvlmCLIPPEGiganticModel"),
            *("HfvlmCLIPSwinModel", "HfvlmCLIPSwinV2Model"),
            *("HfvlmCLIPAVisionModel", "HfvlmCLIPATextModel", "HfvlmCLIPBidirectionalTextModel"),
            *("HfvlmMetaCLIP2TextModel", "HfvlmVisionTrunkModel", "HfvlmTextTrunkModel", "HfvlmTimmTrunkModel"),
        ),
        "AutoModelForZeroShotImageClassification": ("HfvlmCLIPModel",),
        "AutoModelForImageClassification": ("HfvlmCLIPForImageClassification",),
    },
    processor="HfvlmCLIPProcessor",
    image_processors=("HfvlmCLIPImageProcessor",),
    tokenizers=(
        *("HfvlmCLIPTokenizer", "HfvlmCLIPATokenizer", "HfvlmCLIPRobertaTokenizer", "HfvlmCLIPXLMTokenizer"),
        *("HfvlmCLIPNLLBTokenizer", "HfvlmCLIPPaddedTokenizer"),
    ),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
