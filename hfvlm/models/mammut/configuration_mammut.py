"""MaMMUT's sizes. Defaults are those of LAION's openMaMMUT ViT-L/14."""

from dataclasses import field

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import HfvlmConfig, SubConfig, TextConfig, VisionConfig


@strict
class HfvlmMaMMUTVisionConfig(VisionConfig):
    """The vision transformer.

    Args:
        projection_dim: width of the joint space, which is the text tower's.
        cropped_positions: in training, take the positions from a random crop of a grid of n rows and columns,
            as the paper does for detection; openMaMMUT does not, and neither does the default.
    """

    model_type = "hfvlm_mammut_vision"

    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    projection_dim: int = 768
    cropped_positions: int | None = None

    def validate_cropped_positions(self) -> None:
        if self.cropped_positions is not None and self.cropped_positions < max(self.grid):
            raise ValueError(
                f"{type(self).__name__}: cropped_positions {self.cropped_positions} is a grid smaller than that of "
                f"the images, {self.grid}."
            )


@strict
class HfvlmMaMMUTTextConfig(TextConfig):
    """The text decoder.

    Args:
        grounding_interval: cross-attention follows the first layer and every n-th after it.
        grounded_mlp: layers that are followed by cross-attention have an MLP of their own before it.
        token_rows: rows of the table of tokens, where they are not `vocab_size`, the number of scores.
    """

    model_type = "hfvlm_mammut_text"

    grounding_interval: int = 2
    grounded_mlp: bool = True
    token_rows: int | None = None
    pad_token_id: int = 0
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    tie_word_embeddings: bool = False

    @property
    def grounded(self) -> range:
        """The layers that are followed by cross-attention."""
        return range(0, self.num_hidden_layers, self.grounding_interval)

    @property
    def layer_kinds(self) -> list[str]:
        """Of each layer: "full", with an MLP, or "attention", without one."""
        bare = () if self.grounded_mlp else self.grounded
        return ["attention" if i in bare else "full" for i in range(self.num_hidden_layers)]

    def validate_grounding(self) -> None:
        if self.grounding_interval < 1:
            raise ValueError(f"{type(self).__name__}: grounding_interval {self.grounding_interval} is less than 1.")


@strict
class HfvlmMaMMUTConfig(HfvlmConfig):
    """MaMMUT.

    Args:
        pair_loss: "softmax" as openMaMMUT, or "focal" as the paper.
        logit_scale_init_value: logarithm of the temperature's inverse before training.
        contrastive_weight: of the contrastive loss in the sum.
        captioning_weight: of the captioning loss.
    """

    model_type = "hfvlm_mammut"
    sub_configs = {"vision_config": HfvlmMaMMUTVisionConfig, "text_config": HfvlmMaMMUTTextConfig}

    vision_config: SubConfig[HfvlmMaMMUTVisionConfig] = field(default_factory=HfvlmMaMMUTVisionConfig)
    text_config: SubConfig[HfvlmMaMMUTTextConfig] = field(default_factory=HfvlmMaMMUTTextConfig)
    pair_loss: str = "softmax"
    logit_scale_init_value: float = 2.6592
    contrastive_weight: float | int = 1.0
    captioning_weight: float | int = 2.0
    tie_word_embeddings: bool = False

    def validate_widths(self) -> None:
        image, text = self.vision_config.projection_dim, self.text_config.hidden_size
        if image != text:
            raise ValueError(
                f"The joint space is the text tower's: vision_config.projection_dim {image} must be "
                f"text_config.hidden_size {text}."
            )

    def validate_pair_loss(self) -> None:
        if self.pair_loss not in ("softmax", "focal"):
            raise ValueError(f"{type(self).__name__}: pair_loss is softmax or focal, not {self.pair_loss!r}.")
