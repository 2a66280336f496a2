"""Sizes of the vision transformers that open_clip takes from timm and hfvlm writes out. Their projection has a bias.

Defaults are those of MobileCLIP2-L-14, EVA01-g-14, EVA02-E-14, EVA02-B-16, PE-Core-B-16 and PE-Core-bigG-14-448.
"""

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import VisionConfig


@strict
class TimmVisionConfig(VisionConfig):
    """What they share.

    Args:
        projection_dim: width of the joint space; None leaves the projection out.
        drop_path_rate: share of rows that the last layer leaves out in training; earlier layers leave out fewer, down
            to none in the first.
    """

    patch_size: int = 14
    projection_dim: int | None = 1024
    drop_path_rate: float | int = 0.0


@strict
class HfvlmCLIPViTConfig(TimmVisionConfig):
    """CLIP's vision transformer, in MobileCLIP2-L-14."""

    model_type = "hfvlm_clip_vit"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    projection_dim: int | None = 768


@strict
class HfvlmCLIPEVAConfig(TimmVisionConfig):
    """EVA-01-CLIP's vision transformer."""

    model_type = "hfvlm_clip_eva"

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 40
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6


@strict
class HfvlmCLIPEVAPostNormConfig(TimmVisionConfig):
    """EVA-02-CLIP-E's vision transformer, which norms what attention and MLP add."""

    model_type = "hfvlm_clip_eva_post_norm"

    hidden_size: int = 1792
    intermediate_size: int = 15360
    num_hidden_layers: int = 64
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6


@strict
class RotaryVisionConfig(TimmVisionConfig):
    """What those with rotary positions share.

    Args:
        reference_grid_size: rows and columns of the grid that the coordinates of patches are scaled to, whatever the
            image's own grid is.
    """

    patch_size: int = 16
    reference_grid_size: int = 16

    def validate_rotation(self) -> None:
        if (self.hidden_size // self.num_attention_heads) % 4:
            raise ValueError(
                f"{type(self).__name__}: hidden_size {self.hidden_size} with num_attention_heads "
                f"{self.num_attention_heads} gives heads whose width is no multiple of 4, two rotations for each axis."
            )


@strict
class HfvlmCLIPEVA02Config(RotaryVisionConfig):
    """EVA-02-CLIP's vision transformer at sizes B and L: rotary positions, SwiGLU and sub-LN."""

    model_type = "hfvlm_clip_eva02"

    intermediate_size: int = 2048
    layer_norm_eps: float = 1e-6
    projection_dim: int | None = 512


@strict
class HfvlmCLIPPEConfig(RotaryVisionConfig):
    """The Perception Encoder's vision transformer.

    Args:
        pool_heads: heads of the attention that pools the tokens.
        pool_intermediate_size: width inside the MLP after it.
    """

    model_type = "hfvlm_clip_pe"

    reference_grid_size: int = 14
    pool_heads: int = 8
    pool_intermediate_size: int = 3072

    def validate_pool(self) -> None:
        self.check_heads("hidden_size", "pool_heads")


@strict
class HfvlmCLIPPEGiganticConfig(HfvlmCLIPPEConfig):
    """The Perception Encoder's largest vision transformer, without a class token."""

    model_type = "hfvlm_clip_pe_gigantic"

    image_size: int | list[int] | tuple[int, int] = 448
    patch_size: int = 14
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 50
    num_attention_heads: int = 16
    projection_dim: int | None = 1280
    reference_grid_size: int = 32
    pool_intermediate_size: int = 6144
