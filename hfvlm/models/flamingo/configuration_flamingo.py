"""Flamingo's sizes, as OpenFlamingo has them. Defaults are those of OpenFlamingo 3B."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MptConfig

from hfvlm.configuration import HfvlmConfig, SubConfig
from hfvlm.models.clip.configuration_clip import HfvlmCLIPVisionConfig
from hfvlm.models.llava.configuration_llava import openai_vision_config


@strict
class HfvlmFlamingoResamplerConfig(HfvlmConfig):
    """Sizes of the resampler, which makes a fixed number of tokens of an image's patches.

    Args:
        hidden_size: width of the patches and of the tokens.
        head_dim: of each attention head; all heads together need not be as wide as the tokens.
        num_latents: tokens of an image, whatever its size and the number of its frames.
        max_num_frames: frames whose times have learned embeddings, as in the paper; None for a resampler
            of single images, as all releases have.
        max_num_media: images of a text whose order has learned embeddings, an option of OpenFlamingo's code that no
            release has; None for none.
    """

    model_type = "hfvlm_flamingo_resampler"
    base_config_key = "resampler_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    head_dim: int = 64
    num_latents: int = 64
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    max_num_frames: int | None = None
    max_num_media: int | None = None

    def validate_positions(self) -> None:
        for name in ("max_num_frames", "max_num_media"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be None or at least 1.")


@strict
class HfvlmFlamingoMPTConfig(MptConfig):
    """An MPT that transformers' code does not build: with `attn_config.qk_ln`, as of MPT-1B, whole queries and keys
    are normalised before they are cut into heads; feed-forward parts are `expansion_ratio` times as wide as the model,
    which may be any number."""

    model_type = "hfvlm_flamingo_mpt"


def mpt_1b_config() -> HfvlmFlamingoMPTConfig:
    """Return MPT-1B with the tokens of images, of ends, and of padding."""
    attention = {"qk_ln": True, "alibi": True}
    return HfvlmFlamingoMPTConfig(vocab_size=50280, learned_pos_emb=False, attn_config=attention, use_cache=True)


@strict
class HfvlmFlamingoConfig(HfvlmConfig):
    """Flamingo on any language model of transformers.

    Args:
        vision_config: of the CLIP tower, whose patches are taken before its last norm.
        resampler_config: of the resampler.
        text_config: of the language model. Its class selects the model: `MptConfig` is MPT, `HfvlmFlamingoMPTConfig`
            MPT-1B and others that transformers does not have; any causal language model of transformers will do.
        image_token_id: stands in a text for an image; it has a row in the embedding table.
        eos_token_id: ends the text about an image.
        pad_token_id: fills rows.
        cross_attention_interval: every nth layer of the language model has a gated layer before it.
        cross_attention_heads: of each gated layer.
        cross_attention_head_dim: width of each head.
        attention_dropout: of the gated layers.
    """

    model_type = "hfvlm_flamingo"
    token_count_fields = ("image_token_id",)
    sub_configs = {
        "vision_config": HfvlmCLIPVisionConfig,
        "resampler_config": HfvlmFlamingoResamplerConfig,
        "text_config": HfvlmFlamingoMPTConfig,
    }

    vision_config: SubConfig[HfvlmCLIPVisionConfig] = field(default_factory=lambda: openai_vision_config(224))
    resampler_config: SubConfig[HfvlmFlamingoResamplerConfig] = field(default_factory=HfvlmFlamingoResamplerConfig)
    text_config: SubConfig[Any] = field(default_factory=mpt_1b_config)
    image_token_id: int = 50278
    eos_token_id: int = 50277
    pad_token_id: int = 50279
    cross_attention_interval: int = 1
    cross_attention_heads: int = 8
    cross_attention_head_dim: int = 64
    attention_dropout: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        text = self.text_config
        if isinstance(text, dict) and text.get("model_type") == "gpt_neox":
            # transformers 5.4 loses the share of a saved GPT-NeoX's heads that is rotated, but for its old name.
            share = (text.get("rope_parameters") or {}).get("partial_rotary_factor")
            self.text_config = text if share is None else {"rotary_pct": share, **text}
        super().__post_init__(**kwargs)

    @property
    def gated_layers(self) -> list[int]:
        """Indices of the language model's layers before which there is a gated layer."""
        interval = self.cross_attention_interval
        return list(range(interval - 1, self.text_config.num_hidden_layers, interval))

    def count_tokens(self) -> int:
        """Count the placeholders of an image: one, whatever it shows, since its tokens are no part of the text."""
        return 1

    def validate_widths(self) -> None:
        patches, latents = self.vision_config.hidden_size, self.resampler_config.hidden_size
        if patches != latents:
            raise ValueError(
                f"resampler_config.hidden_size {latents} is not vision_config.hidden_size {patches}: the patches "
                "are the inputs of the resampler as they are."
            )

    def validate_interval(self) -> None:
        layers = self.text_config.num_hidden_layers
        if not 1 <= self.cross_attention_interval <= layers:
            raise ValueError(
                f"cross_attention_interval {self.cross_attention_interval} is not in 1..{layers}, the layers of "
                "text_config."
            )

    def validate_tokens(self) -> None:
        if max(self.image_token_id, self.eos_token_id) >= self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id {self.image_token_id} and eos_token_id {self.eos_token_id} need rows in the table of "
                f"embeddings, which has {self.text_config.vocab_size} (text_config.vocab_size)."
            )
