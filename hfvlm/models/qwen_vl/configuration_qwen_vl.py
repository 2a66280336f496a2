"""Qwen-VL's sizes. Defaults are those of Qwen-VL and Qwen-VL-Chat."""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from hfvlm.configuration import HfvlmConfig, SubConfig, TextConfig, VisionConfig


@strict
class HfvlmQwenVLVisionConfig(VisionConfig):
    """OpenCLIP's ViT-bigG without its class token, at a higher resolution than it was trained at."""

    model_type = "hfvlm_qwen_vl_vision"

    hidden_size: int = 1664
    intermediate_size: int = 8192
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 448
    patch_size: int = 14


@strict
class HfvlmQwenVLResamplerConfig(HfvlmConfig):
    """Sizes of the resampler, which makes a few tokens of an image's many patches.

    Args:
        context_size: width of the patches.
        num_queries: tokens of an image, a square number.
    """

    model_type = "hfvlm_qwen_vl_resampler"
    base_config_key = "projector_config"

    context_size: int = 1664
    hidden_size: int = 4096
    num_attention_heads: int = 32
    num_queries: int = 256
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0

    @property
    def edge(self) -> int:
        """Queries along an edge of an image."""
        return round(self.num_queries**0.5)

    def validate_square(self) -> None:
        if self.edge**2 != self.num_queries:
            raise ValueError(f"num_queries {self.num_queries} is no square number; queries form a grid.")

    def validate_heads(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}, and of 4, since positions are sines and cosines of two coordinates."
            )


@strict
class HfvlmQwenVLTextConfig(TextConfig):
    """Qwen-7B.

    Args:
        trained_length: tokens of the longest text in training; for longer ones the next two matter.
        dynamic_ntk: lower rotary frequencies with the length of the prompt.
        logn_attention: scale queries with the logarithm of their position.
        linear_bias: of every linear layer; queries, keys and values have one in any case.
        rope_theta: base of the rotary frequencies.
        rotary_share: of each head, that is rotated.
        embedding_dropout: in training.
    """

    model_type = "hfvlm_qwen_vl_text"
    # As LLaMA's, whose names the layers have.
    base_model_tp_plan = LlamaConfig.base_model_tp_plan
    base_model_pp_plan = LlamaConfig.base_model_pp_plan

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    layer_norm_eps: float = 1e-6
    vocab_size: int = 151936
    max_position_embeddings: int = 8192
    trained_length: int = 2048
    dynamic_ntk: bool = True
    logn_attention: bool = True
    linear_bias: bool = False
    rope_theta: float | int = 10000.0
    rotary_share: float | int = 1.0
    embedding_dropout: float | int = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 151643
    # The end of a text, and in conversations the end of a turn and the start of another.
    eos_token_id: int | list[int] | None = field(  # type: ignore[assignment]
        default_factory=lambda: [151643, 151645, 151644]
    )

    @property
    def mlp_bias(self) -> bool:
        """`linear_bias`, by the name that LLaMA's MLP has for it."""
        return self.linear_bias

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """How much of each head is rotated."""
        return int(self.head_dim * self.rotary_share)

    def validate_rotary(self) -> None:
        if self.rotary_size < 4 or self.rotary_size % 2 or self.rotary_share > 1:
            raise ValueError(
                f"rotary_share {self.rotary_share} of a head of {self.head_dim} is {self.rotary_size}: it must be "
                "even, at least 4, and no more than the head."
            )


@strict
class HfvlmQwenVLConfig(HfvlmConfig):
    """Qwen-VL and Qwen-VL-Chat.

    Args:
        vision_config: of the vision tower.
        projector_config: of the resampler.
        text_config: of the language model.
        image_token_id: the placeholder, the tokenizer's `<imgpad>`.
    """

    model_type = "hfvlm_qwen_vl"
    token_count_fields = ("projector_config.num_queries",)
    sub_configs = {
        "vision_config": HfvlmQwenVLVisionConfig,
        "projector_config": HfvlmQwenVLResamplerConfig,
        "text_config": HfvlmQwenVLTextConfig,
    }

    vision_config: SubConfig[HfvlmQwenVLVisionConfig] = field(default_factory=HfvlmQwenVLVisionConfig)
    projector_config: SubConfig[HfvlmQwenVLResamplerConfig] = field(default_factory=HfvlmQwenVLResamplerConfig)
    text_config: SubConfig[HfvlmQwenVLTextConfig] = field(default_factory=HfvlmQwenVLTextConfig)
    image_token_id: int = 151859

    def count_tokens(self) -> int:
        """Count the placeholders of an image."""
        return self.projector_config.num_queries

    def validate_widths(self) -> None:
        vision, projector, text = self.vision_config, self.projector_config, self.text_config
        if (projector.context_size, projector.hidden_size) != (vision.hidden_size, text.hidden_size):
            raise ValueError(
                f"projector_config takes {projector.context_size} and makes {projector.hidden_size} "
                f"(context_size, hidden_size), but vision_config.hidden_size is {vision.hidden_size} and "
                f"text_config.hidden_size {text.hidden_size}."
            )
