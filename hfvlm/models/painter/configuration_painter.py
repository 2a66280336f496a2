"""Painter's sizes. Defaults are those of the released ViT-L."""

from dataclasses import field

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import TowerConfig

PIXEL_LOSSES = ("smooth_l1", "l1", "l2", "l1l2")


@strict
class HfvlmPainterConfig(TowerConfig):
    """A vision transformer over two images of one size, a prompt above a query, and over their targets.

    Args:
        image_size: height and width in pixels of the two images, one above the other.
        pretrain_image_size: edge in pixels of the images that the table of positions was made for.
        qkv_bias: whether queries, keys and values have biases.
        use_relative_positions: whether attention depends on the rows and columns between query and key.
        window_size: edge in patches of the windows of those layers that attend within windows.
        window_indices: which layers these are; in the release none, whose code meant to name sixteen of them.
        residual_indices: layers that a bottleneck of convolutions follows; in the release none.
        merge_index: the layer after which the tokens of images and targets, apart until then, are averaged.
        intermediate_hidden_state_indices: the layers whose outputs the decoder takes.
        decoder_hidden_size: channels of each pixel in the decoder.
        drop_path_rate: of the last layer; it grows from zero at the first.
        pixel_loss: "smooth_l1" (with beta 0.01), "l1", "l2", or "l1l2", the mean of these two.
    """

    model_type = "hfvlm_painter"
    num_channels = 3

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6
    image_size: list[int] | tuple[int, int] = (896, 448)
    patch_size: int = 16
    pretrain_image_size: int = 224
    qkv_bias: bool = True
    use_relative_positions: bool = True
    window_size: int = 14
    window_indices: list[int] | tuple[int, ...] = ()
    residual_indices: list[int] | tuple[int, ...] = ()
    merge_index: int = 2
    intermediate_hidden_state_indices: list[int] | tuple[int, ...] = field(default_factory=lambda: [5, 11, 17, 23])
    decoder_hidden_size: int = 64
    drop_path_rate: float | int = 0.1
    pixel_loss: str = "smooth_l1"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of both images."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    def validate_images(self) -> None:
        size = list(self.image_size)
        if len(size) != 2 or size[0] % (2 * self.patch_size) or size[1] % self.patch_size:
            raise ValueError(
                f"image_size {size} must be the height and width of two images of whole patches, one above the other: "
                f"multiples of {2 * self.patch_size} and {self.patch_size}."
            )
        if self.pretrain_image_size < self.patch_size:
            raise ValueError(f"pretrain_image_size {self.pretrain_image_size} is smaller than patch_size.")

    def validate_layers(self) -> None:
        depth, taken = self.num_hidden_layers, list(self.intermediate_hidden_state_indices)
        for name in ("window_indices", "residual_indices", "intermediate_hidden_state_indices"):
            values = list(getattr(self, name))
            if values != sorted(set(values)) or any(not 0 <= index < depth for index in values):
                raise ValueError(f"{name} {values} must be layers of 0 to {depth - 1}, in order.")
        if not taken or not 0 <= self.merge_index <= taken[0]:
            raise ValueError(
                f"merge_index {self.merge_index} must be a layer before the decoder's, "
                f"intermediate_hidden_state_indices {taken}, or the first of these."
            )

    def validate_loss(self) -> None:
        if self.pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f"pixel_loss {self.pixel_loss!r} must be one of {', '.join(PIXEL_LOSSES)}.")
