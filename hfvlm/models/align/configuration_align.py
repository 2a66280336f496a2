"""ALIGN's sizes. Defaults are those of Kakao Brain's COYO-ALIGN-B7-Base."""

from dataclasses import field
from math import ceil
from typing import NamedTuple

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import BertTextConfig, HfvlmConfig, SubConfig

# Of EfficientNet-B0 (https://arxiv.org/abs/1905.11946).
STEM_CHANNELS = 32


class BlockSizes(NamedTuple):
    """One MBConv block, after scaling."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    expand_ratio: int


@strict
class HfvlmALIGNVisionConfig(HfvlmConfig):
    """An EfficientNet: B0's stages, scaled. It takes images of any size.

    Args:
        width_coefficient: multiplies the channels, which are then rounded to multiples of `depth_divisor`.
        depth_coefficient: multiplies the blocks of each stage, rounded up.
        out_channels: of each stage of B0; and so on for the other lists.
        squeeze_ratio: width of squeeze-and-excitation, as a share of a block's input.
        drop_connect_rate: of the last block's stochastic depth; it grows from zero.
        projection_dim: width of the joint space; None where the pooled features are the embedding, as in B7.
    """

    model_type = "hfvlm_align_vision"
    base_config_key = "vision_config"

    num_channels: int = 3
    width_coefficient: float | int = 2.0
    depth_coefficient: float | int = 3.1
    depth_divisor: int = 8
    kernel_sizes: list[int] | tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    out_channels: list[int] | tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    strides: list[int] | tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    num_block_repeats: list[int] | tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    expand_ratios: list[int] | tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    squeeze_ratio: float | int = 0.25
    hidden_act: str = "swish"
    batch_norm_eps: float = 1e-3
    drop_connect_rate: float | int = 0.2
    projection_dim: int | None = None

    def scaled(self, channels: int) -> int:
        """Channels at this width: the nearest multiple of the divisor that is not more than a tenth smaller."""
        wanted, divisor = channels * self.width_coefficient, self.depth_divisor
        rounded = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
        return rounded if rounded >= 0.9 * wanted else rounded + divisor

    @property
    def stem_size(self) -> int:
        return self.scaled(STEM_CHANNELS)

    @property
    def stage_depths(self) -> list[int]:
        """Blocks of each stage at this depth."""
        return [ceil(self.depth_coefficient * repeats) for repeats in self.num_block_repeats]

    @property
    def blocks(self) -> list[BlockSizes]:
        """All blocks in their order. The first of a stage has its stride and changes the channels."""
        sizes, channels = [], self.stem_size
        stages = zip(self.out_channels, self.kernel_sizes, self.strides, self.expand_ratios, strict=True)
        for depth, (out_channels, kernel_size, stride, expand_ratio) in zip(self.stage_depths, stages, strict=True):
            for i in range(depth):
                out = self.scaled(out_channels)
                sizes.append(BlockSizes(channels, out, kernel_size, 1 if i else stride, expand_ratio))
                channels = out
        return sizes

    @property
    def hidden_size(self) -> int:
        """Channels of the last feature map."""
        return self.scaled(self.out_channels[-1])

    @property
    def pooled_size(self) -> int:
        """Width of the pooled output that a classifier takes."""
        return self.hidden_size

    def validate_stages(self) -> None:
        lists = ("kernel_sizes", "out_channels", "strides", "num_block_repeats", "expand_ratios")
        lengths = {name: len(getattr(self, name)) for name in lists}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"{type(self).__name__}: a stage is one number of each list, but the lists have {lengths}."
            )


@strict
class HfvlmALIGNTextConfig(BertTextConfig):
    """The BERT."""

    model_type = "hfvlm_align_text"

    type_vocab_size: int = 2
    projection_dim: int = 640


@strict
class HfvlmALIGNConfig(HfvlmConfig):
    """ALIGN.

    Args:
        temperature_init_value: what similarities are divided by.
        label_smoothing: share of the loss' targets that is spread over the batch.
    """

    model_type = "hfvlm_align"
    sub_configs = {"vision_config": HfvlmALIGNVisionConfig, "text_config": HfvlmALIGNTextConfig}

    vision_config: SubConfig[HfvlmALIGNVisionConfig] = field(default_factory=HfvlmALIGNVisionConfig)
    text_config: SubConfig[HfvlmALIGNTextConfig] = field(default_factory=HfvlmALIGNTextConfig)
    temperature_init_value: float | int = 1.0
    label_smoothing: float | int = 0.1

    def validate_joint_space(self) -> None:
        image = self.vision_config.projection_dim or self.vision_config.hidden_size
        if image != self.text_config.projection_dim:
            raise ValueError(
                f"Texts have {self.text_config.projection_dim} dimensions (projection_dim in text_config), images "
                f"have {image}: set projection_dim in vision_config."
            )
