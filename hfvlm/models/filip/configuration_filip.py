"""FILIP's sizes. Defaults are those of the public reproduction, a ViT-B/32 trained on YFCC15M."""

from dataclasses import field

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import DualEncoderConfig, SubConfig, TextConfig, VisionConfig


@strict
class HfvlmFILIPVisionConfig(VisionConfig):
    """The vision transformer. `projection_dim` is the width of the space in which tokens are compared."""

    model_type = "hfvlm_filip_vision"

    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    projection_dim: int = 256


@strict
class HfvlmFILIPTextConfig(TextConfig):
    """The text transformer."""

    model_type = "hfvlm_filip_text"

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    projection_dim: int = 256
    vocab_size: int = 49409
    bos_token_id: int | None = 49407
    eos_token_id: int | None = 49408
    pad_token_id: int | None = 0


@strict
class HfvlmFILIPConfig(DualEncoderConfig):
    """FILIP.

    Args:
        top_k: in the loss, how many tokens of a text (of an image) those of the images (texts) may be matched with:
            those that resemble their own pair most. None, as in most of the paper, for all.
        summary_dim: width of the space in which whole images and texts are compared.
        summary_loss_weight: of that comparison in the loss. The reproduction computes it and weighs it with zero.
        logit_scale_init_value: logarithm of the temperatures' inverse before training, of both comparisons.
    """

    model_type = "hfvlm_filip"
    sub_configs = {"vision_config": HfvlmFILIPVisionConfig, "text_config": HfvlmFILIPTextConfig}

    vision_config: SubConfig[HfvlmFILIPVisionConfig] = field(default_factory=HfvlmFILIPVisionConfig)
    text_config: SubConfig[HfvlmFILIPTextConfig] = field(default_factory=HfvlmFILIPTextConfig)
    top_k: int | None = 16
    summary_dim: int = 768
    summary_loss_weight: float | int = 0.0

    def validate_selection(self) -> None:
        rows, columns = self.vision_config.grid
        fewest = min(rows * columns, self.text_config.max_position_embeddings)
        if self.top_k is not None and not 0 < self.top_k <= fewest:
            raise ValueError(
                f"top_k is {self.top_k}, but of {rows * columns} patches and "
                f"{self.text_config.max_position_embeddings} tokens at most {fewest} can be chosen."
            )
