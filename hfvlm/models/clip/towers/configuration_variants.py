"""Sizes of the towers of CLIP's successors, where these have another structure. Defaults are those of ViT-L/14 CLIPA,
MetaCLIP 2 ViT-H/14 and MobileCLIP2-L/14."""

from huggingface_hub.dataclasses import strict

from hfvlm.models.clip.configuration_clip import HfvlmCLIPTextConfig, HfvlmCLIPVisionConfig


@strict
class HfvlmCLIPAVisionConfig(HfvlmCLIPVisionConfig):
    """CLIPA's vision transformer."""

    model_type = "hfvlm_clipa_vision"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    patch_size: int = 14
    hidden_act: str = "gelu"
    projection_dim: int | None = 768


@strict
class HfvlmCLIPBidirectionalTextConfig(HfvlmCLIPTextConfig):
    """MobileCLIP 2's text transformer."""

    model_type = "hfvlm_clip_bidirectional_text"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    projection_dim: int | None = 768
    pad_token_id: int | None = 0


@strict
class HfvlmCLIPATextConfig(HfvlmCLIPBidirectionalTextConfig):
    """CLIPA's text transformer, over BERT's pieces; its embedding has more rows than these."""

    model_type = "hfvlm_clipa_text"

    vocab_size: int = 32000
    max_position_embeddings: int = 32
    bos_token_id: int | None = 101
    eos_token_id: int | None = None


@strict
class HfvlmMetaCLIP2TextConfig(HfvlmCLIPTextConfig):
    """MetaCLIP 2's text transformer, over XLM-V's pieces."""

    model_type = "hfvlm_metaclip2_text"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    projection_dim: int | None = 1024
    vocab_size: int = 901629
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2
    pad_token_id: int | None = 1
