"""The convolutions of a VQGAN (https://arxiv.org/abs/2012.09841), which latent diffusion has inherited.

Source: https://github.com/CompVis/taming-transformers at 3ba01b2, taming/modules/diffusionmodules/model.py. A
configuration's fields are those that `HfvlmDALLEMiniVQGANConfig` documents.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from hfvlm.modules.transformer import Attention

GROUPS = 32


class GroupNorm(nn.GroupNorm):
    """Of 32 groups of channels."""

    def __init__(self, config: Any, channels: int):
        super().__init__(GROUPS, channels, eps=config.group_norm_eps)


class ResidualBlock(GradientCheckpointingLayer):
    """Two convolutions of normalised channels, next to a shortcut."""

    def __init__(self, config: Any, before: int, channels: int):
        super().__init__()
        self.norm1 = GroupNorm(config, before)
        self.conv1 = nn.Conv2d(before, channels, 3, padding=1)
        self.norm2 = GroupNorm(config, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Identity() if before == channels else nn.Conv2d(before, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class MixingBlock(nn.Module):
    """Attention of all pixels of a map to each other, with one head."""

    def __init__(self, config: Any, channels: int):
        super().__init__()
        self.norm = GroupNorm(config, channels)
        self.attention = Attention(config, width=channels, heads=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).mT
        return x + self.attention(tokens)[0].mT.reshape(x.shape)


class Resample(nn.Module):
    """Halves or doubles rows and columns; a convolution that halves them sees zeros after the last of them."""

    def __init__(self, channels: int, *, down: bool, conv: bool):
        super().__init__()
        self.down = down
        stride, padding = (2, 0) if down else (1, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=padding) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.down:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            return x if self.conv is None else self.conv(x)
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Blocks of one resolution, each with attention where the level has any, and the way to the next."""

    def __init__(self, config: Any, index: int, before: int, *, down: bool):
        super().__init__()
        channels, levels = config.hidden_size * config.channel_ratios[index], len(config.channel_ratios)
        count = config.blocks_per_level + (not down)
        self.blocks = nn.ModuleList(ResidualBlock(config, channels if i else before, channels) for i in range(count))
        mixing = count if index in config.attention_levels else 0
        self.mixing = nn.ModuleList(MixingBlock(config, channels) for _ in range(mixing))
        last = index == (levels - 1 if down else 0)
        self.resample = nn.Identity() if last else Resample(channels, down=down, conv=config.resample_with_conv)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            x = self.mixing[i](x) if self.mixing else x
        return self.resample(x)


class Middle(nn.Module):
    """The blocks of the lowest resolution: residual, attention, residual."""

    def __init__(self, config: Any, channels: int):
        super().__init__()
        self.block1 = ResidualBlock(config, channels, channels)
        self.mixing = MixingBlock(config, channels)
        self.block2 = ResidualBlock(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.mixing(self.block1(x)))


class VQGANEncoder(nn.Module):
    """(B, 3, H, W) -> (B, latent_channels, H / stride, W / stride)."""

    def __init__(self, config: Any):
        super().__init__()
        widths = [config.hidden_size * ratio for ratio in config.channel_ratios]
        self.stem = nn.Conv2d(config.num_channels, config.hidden_size, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(config, i, before, down=True) for i, before in enumerate([config.hidden_size, *widths[:-1]])
        )
        self.middle = Middle(config, widths[-1])
        self.norm = GroupNorm(config, widths[-1])
        self.head = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for level in self.levels:
            x = level(x)
        return self.head(F.silu(self.norm(self.middle(x))))


class VQGANDecoder(nn.Module):
    """(B, latent_channels, h, w) -> (B, 3, h * stride, w * stride); the first level is the last to be applied."""

    def __init__(self, config: Any):
        super().__init__()
        widths = [config.hidden_size * ratio for ratio in config.channel_ratios]
        self.stem = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.middle = Middle(config, widths[-1])
        self.levels = nn.ModuleList(
            Level(config, i, before, down=False) for i, before in enumerate([*widths[1:], widths[-1]])
        )
        self.norm = GroupNorm(config, widths[0])
        self.head = nn.Conv2d(widths[0], config.num_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.stem(x))
        for level in reversed(self.levels):
            x = level(x)
        return self.head(F.silu(self.norm(x)))
