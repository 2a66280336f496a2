"""PaliGemma's sizes. Defaults are those of PaliGemma 3B at 224 px."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GemmaConfig

from hfvlm.configuration import HfvlmConfig, SubConfig, VisionConfig

# <loc0000> to <loc1023> and <seg000> to <seg127> follow Gemma's own 256000 pieces.
VOCABULARY = 257152
FULL = "full_attention"


@strict
class HfvlmPaliGemmaVisionConfig(VisionConfig):
    """SigLIP's vision transformer So400m/14, whose patches are not pooled."""

    model_type = "hfvlm_paligemma_vision"

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    patch_size: int = 14
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6


def gemma_config() -> GemmaConfig:
    """Return Gemma 2B with the pieces of regions."""
    return GemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
    )


@strict
class HfvlmPaliGemmaConfig(HfvlmConfig):
    """PaliGemma, and with a `text_config` of Gemma 2's PaliGemma 2.

    The authors' code has no window in the attention of Gemma 2: all of `text_config.layer_types` are "full_attention",
    which is the default of a dictionary here.

    Args:
        vision_config: of the SigLIP tower.
        text_config: of Gemma or Gemma 2.
        image_token_id: the placeholder, of which each image takes as many as it has patches. The first id after the
            vocabulary suffices: placeholders are never looked up.
        label_smoothing: share of the loss that all other tokens of the vocabulary have.
    """

    model_type = "hfvlm_paligemma"
    token_count_fields = ("vision_config.image_size", "vision_config.patch_size")
    sub_configs = {"vision_config": HfvlmPaliGemmaVisionConfig, "text_config": GemmaConfig}

    vision_config: SubConfig[HfvlmPaliGemmaVisionConfig] = field(default_factory=HfvlmPaliGemmaVisionConfig)
    text_config: SubConfig[Any] = field(default_factory=gemma_config)
    image_token_id: int = VOCABULARY
    label_smoothing: float | int = 0.0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        text = self.text_config
        if isinstance(text, Mapping) and text.get("model_type") == "gemma2" and text.get("layer_types") is None:
            self.text_config = dict(text) | {"layer_types": [FULL] * text.get("num_hidden_layers", 26)}
        super().__post_init__(**kwargs)

    def validate_window(self) -> None:
        kinds = {*(getattr(self.text_config, "layer_types", None) or [FULL])}
        if kinds != {FULL}:
            raise ValueError(
                f"text_config.layer_types {sorted(kinds)}: PaliGemma's language model has no sliding window, all its "
                f"layers are {FULL!r}."
            )

    def count_tokens(self) -> int:
        """Count the placeholders of an image."""
        return self.vision_config.patch_count


@strict
class HfvlmPaliGemmaMaskConfig(HfvlmConfig):
    """The autoencoder between masks of 64 x 64 pixels and sixteen codes, of which <seg000> to <seg127> are the names.

    Args:
        encoder_channels: of the four convolutions that halve a mask.
        decoder_channels: of the first convolution, and of the four that double its output.
        code_dim: width of a code's vector.
        num_codes: how many there are.
        commitment: weight, in the loss, of the encoder's distance to its codes.
    """

    model_type = "hfvlm_paligemma_mask"

    encoder_channels: list[int] | tuple[int, ...] = (16, 32, 64, 128)
    decoder_channels: list[int] | tuple[int, ...] = (128, 128, 64, 32, 16)
    code_dim: int = 512
    num_codes: int = 128
    commitment: float | int = 0.25

    def validate_channels(self) -> None:
        if (len(self.encoder_channels), len(self.decoder_channels)) != (4, 5):
            raise ValueError(
                f"encoder_channels {list(self.encoder_channels)} and decoder_channels {list(self.decoder_channels)}: "
                "there are four halvings, and a first convolution and four doublings."
            )
