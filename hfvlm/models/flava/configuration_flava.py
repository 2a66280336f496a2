"""FLAVA's sizes. Defaults are those of the released model."""

from dataclasses import field

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import BertTextConfig, HfvlmConfig, SubConfig, TowerConfig, VisionConfig


@strict
class HfvlmFLAVAVisionConfig(VisionConfig):
    """The image encoder.

    Args:
        projection_dim: width of the joint space.
        hidden_dropout: on every branch and between the layers of an MLP, in training.
        mask_token: whether there is a token that stands for masked patches.
    """

    model_type = "hfvlm_flava_vision"

    layer_norm_eps: float = 1e-12
    projection_dim: int = 768
    hidden_dropout: float | int = 0.0
    mask_token: bool = True

    def validate_patch_dropout(self) -> None:
        if self.patch_dropout:
            raise ValueError(
                f"{type(self).__name__}: its losses need all patches in their positions, no patch_dropout."
            )


@strict
class HfvlmFLAVATextConfig(BertTextConfig):
    """The text encoder.

    Args:
        projection_dim: width of the joint space.
        hidden_dropout: on every branch and between the layers of an MLP, in training.
    """

    model_type = "hfvlm_flava_text"

    type_vocab_size: int = 2
    projection_dim: int = 768
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0


@strict
class HfvlmFLAVAMultimodalConfig(TowerConfig):
    """The multimodal encoder.

    Args:
        image_hidden_size: width of the image encoder's tokens, which are projected to this one's.
        text_hidden_size: width of the text encoder's.
        hidden_dropout: on every branch and between the layers of an MLP, in training.
    """

    model_type = "hfvlm_flava_multimodal"
    base_config_key = "multimodal_config"

    num_hidden_layers: int = 6
    layer_norm_eps: float = 1e-12
    image_hidden_size: int = 768
    text_hidden_size: int = 768
    hidden_dropout: float | int = 0.0


@strict
class HfvlmFLAVACodebookConfig(HfvlmConfig):
    """The encoder of DALL-E's discrete VAE, whose codes are the targets of masked patches.

    Args:
        hidden_size: channels of the first group of blocks; each of the next three groups has twice as many.
        vocab_size: number of codes.
        blocks_per_group: of which a group's first changes the channels.
        num_groups: that the gain of the blocks is computed from; there are always four.
    """

    model_type = "hfvlm_flava_codebook"
    base_config_key = "codebook_config"

    num_channels: int = 3
    hidden_size: int = 256
    vocab_size: int = 8192
    blocks_per_group: int = 2
    num_groups: int = 4


@strict
class HfvlmFLAVAConfig(HfvlmConfig):
    """FLAVA. `architectures` names the class that a checkpoint is for; the others load their parts of its folder.

    Args:
        logit_scale_init_value: logarithm of what cosine similarities are multiplied by, before training; None does
            not scale them.
        head_act: activation of the heads that predict masked words and patches.
        head_layer_norm_eps: of their norm.
        mim_weight: of the loss of masked patches, where there is no text; 0 leaves a loss out.
        mlm_weight: of the loss of masked words, where there is no image.
        mmm_image_weight: of the loss of masked patches, where there is a text.
        mmm_text_weight: of the loss of masked words, where there is an image.
        itm_weight: of the matching loss.
        contrastive_weight: of the contrastive loss.
        classifier_hidden_sizes: widths of a classifier's layers but the last.
        classifier_act: their activation.
        classifier_dropout: after each of them, in training.
    """

    model_type = "hfvlm_flava"
    sub_configs = {
        "vision_config": HfvlmFLAVAVisionConfig,
        "text_config": HfvlmFLAVATextConfig,
        "multimodal_config": HfvlmFLAVAMultimodalConfig,
        "codebook_config": HfvlmFLAVACodebookConfig,
    }

    architectures: list[str] | None = field(default_factory=lambda: ["HfvlmFLAVAModel"])
    vision_config: SubConfig[HfvlmFLAVAVisionConfig] = field(default_factory=HfvlmFLAVAVisionConfig)
    text_config: SubConfig[HfvlmFLAVATextConfig] = field(default_factory=HfvlmFLAVATextConfig)
    multimodal_config: SubConfig[HfvlmFLAVAMultimodalConfig] = field(default_factory=HfvlmFLAVAMultimodalConfig)
    codebook_config: SubConfig[HfvlmFLAVACodebookConfig] = field(default_factory=HfvlmFLAVACodebookConfig)
    logit_scale_init_value: float | int | None = 2.6592
    head_act: str = "gelu"
    head_layer_norm_eps: float = 1e-5
    mim_weight: float | int = 1.0
    mlm_weight: float | int = 1.0
    mmm_image_weight: float | int = 1.0
    mmm_text_weight: float | int = 1.0
    itm_weight: float | int = 1.0
    contrastive_weight: float | int = 1.0
    classifier_hidden_sizes: list[int] | tuple[int, ...] = (768,)
    classifier_act: str = "relu"
    classifier_dropout: float | int = 0.5

    def validate_widths(self) -> None:
        vision, text, both = self.vision_config, self.text_config, self.multimodal_config
        if vision.projection_dim != text.projection_dim:
            raise ValueError(
                f"projection_dim differs: {vision.projection_dim} in vision_config, {text.projection_dim} in "
                "text_config."
            )
        widths, read = (vision.hidden_size, text.hidden_size), (both.image_hidden_size, both.text_hidden_size)
        if widths != read:
            raise ValueError(
                f"multimodal_config has an image_hidden_size and a text_hidden_size of {read}, the encoders' "
                f"hidden_size are {widths}."
            )
