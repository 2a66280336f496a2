"""CoCa's sizes. Defaults are those of LAION's ViT-B/32."""

from dataclasses import field

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import DualEncoderConfig, SubConfig, TextConfig, VisionConfig


@strict
class HfvlmCoCaVisionConfig(VisionConfig):
    """The vision transformer and its attentional pooler.

    Args:
        projection_dim: width of the joint space, of the pooler and of what texts are generated from.
        num_queries: tokens that the pooler makes: one for the joint space, the others to generate from.
        pooler_heads: of the pooler's attention.
    """

    model_type = "hfvlm_coca_vision"

    patch_size: int = 32
    projection_dim: int = 512
    num_queries: int = 256
    pooler_heads: int = 8

    @property
    def pooled_size(self) -> int:
        return self.projection_dim

    def validate_pooler(self) -> None:
        self.check_heads("projection_dim", "pooler_heads")
        if self.num_queries < 2:
            raise ValueError(f"{type(self).__name__}: num_queries {self.num_queries} leaves none to generate from.")


@strict
class HfvlmCoCaTextConfig(TextConfig):
    """The text decoder, whose upper half attends to the image.

    Args:
        num_hidden_layers: of both halves.
        multimodal_layers: how many of them are the upper half.
        multimodal_heads: of the upper half's attention.
        max_position_embeddings: tokens of the longest text. The class token that follows has a position of its own.
        correct_class_mask: hide the padding from the class token, and the class token from none. The released weights
            were trained with a mask that is shifted by one.
        projection_dim: width of the joint space.
    """

    model_type = "hfvlm_coca_text"

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    multimodal_layers: int = 12
    multimodal_heads: int = 8
    max_position_embeddings: int = 76
    correct_class_mask: bool = False
    projection_dim: int = 512
    pad_token_id: int = 0
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    tie_word_embeddings: bool = False

    @property
    def mask_shift(self) -> int:
        """Tokens by which the mask of padding is shifted."""
        return int(not self.correct_class_mask)

    @property
    def unimodal_layers(self) -> int:
        """How many layers are the lower half."""
        return self.num_hidden_layers - self.multimodal_layers

    def validate_halves(self) -> None:
        if not 0 < self.multimodal_layers < self.num_hidden_layers:
            raise ValueError(
                f"{type(self).__name__}: multimodal_layers {self.multimodal_layers} must be a part of the "
                f"num_hidden_layers {self.num_hidden_layers}."
            )
        self.check_heads("hidden_size", "multimodal_heads")


@strict
class HfvlmCoCaConfig(DualEncoderConfig):
    """CoCa.

    Args:
        logit_scale_init_value: logarithm of the temperature's inverse before training.
        contrastive_weight: of the contrastive loss in the sum.
        captioning_weight: of the captioning loss.
    """

    model_type = "hfvlm_coca"
    sub_configs = {"vision_config": HfvlmCoCaVisionConfig, "text_config": HfvlmCoCaTextConfig}

    vision_config: SubConfig[HfvlmCoCaVisionConfig] = field(default_factory=HfvlmCoCaVisionConfig)
    text_config: SubConfig[HfvlmCoCaTextConfig] = field(default_factory=HfvlmCoCaTextConfig)
    contrastive_weight: float | int = 1.0
    captioning_weight: float | int = 2.0
    tie_word_embeddings: bool = False

    def validate_widths(self) -> None:
        image = self.vision_config.projection_dim
        if image != self.text_config.hidden_size:
            raise ValueError(
                f"The pooler's tokens are {image} wide (vision_config.projection_dim), the text decoder that "
                f"attends to them is {self.text_config.hidden_size} wide (text_config.hidden_size)."
            )
