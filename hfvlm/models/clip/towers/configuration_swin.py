"""Sizes of timm's Swin and Swin-V2. Defaults are those of swin_base_patch4_window7_224."""

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import HfvlmConfig


@strict
class HfvlmCLIPSwinConfig(HfvlmConfig):
    """timm's Swin, which takes maps that are not made of whole windows otherwise than its authors' code.

    Args:
        image_size: one edge in pixels, or (height, width): where a stage's map is not longer than the window, the
            window has its size.
        embed_dim: width of the first stage; each other is twice as wide as the one before.
        depths: layers of each stage.
        num_heads: attention heads of each stage.
        window_size: edge of a window, in tokens.
        mlp_ratio: width of the MLPs, in widths of their stages.
        projection_dim: width of the joint space; None leaves the projection out.
        projection_bias: whether the projection has a bias.
        drop_path_rate: share of rows that the last layer leaves out in training; earlier layers leave out fewer, down
            to none in the first.
    """

    model_type = "hfvlm_clip_swin"
    base_config_key = "vision_config"

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 4
    num_channels: int = 3
    embed_dim: int = 128
    depths: list[int] | tuple[int, ...] = (2, 2, 18, 2)
    num_heads: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    window_size: int = 7
    mlp_ratio: float | int = 4.0
    projection_dim: int | None = 512
    projection_bias: bool = False
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0

    @property
    def hidden_size(self) -> int:
        """Width of the last stage."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    @property
    def pooled_size(self) -> int:
        """Width of the pooled output that a classifier takes."""
        return self.hidden_size

    def map_of(self, stage: int) -> tuple[int, int]:
        """Return height and width of a stage's map."""
        size = self.image_size
        edges = (size, size) if isinstance(size, int) else size
        height, width = (-(-(edge // self.patch_size) // 2**stage) for edge in edges)
        return height, width

    def window_of(self, stage: int) -> tuple[int, int]:
        """Return height and width of a stage's windows."""
        height, width = self.map_of(stage)
        return min(height, self.window_size), min(width, self.window_size)

    def validate_stages(self) -> None:
        if len(self.depths) != len(self.num_heads):
            raise ValueError(f"{type(self).__name__}: depths {self.depths} and num_heads {self.num_heads} differ.")
        widths = [self.embed_dim * 2**stage for stage in range(len(self.depths))]
        if any(width % heads for width, heads in zip(widths, self.num_heads, strict=True)):
            raise ValueError(f"{type(self).__name__}: num_heads {self.num_heads} do not divide the widths {widths}.")


@strict
class HfvlmCLIPSwinV2Config(HfvlmCLIPSwinConfig):
    """timm's Swin-V2. `pretrained_windows` are the edges of the windows that each stage's positions were learned with,
    0 where these are its own."""

    model_type = "hfvlm_clip_swin_v2"

    pretrained_windows: list[int] | tuple[int, ...] = (0, 0, 0, 0)
