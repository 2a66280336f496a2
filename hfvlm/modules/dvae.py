"""The convolutions of DALL-E's discrete VAE (https://arxiv.org/abs/2102.12092;
https://github.com/openai/DALL-E at 5be4b23), which DALL-E, BEiT and FLAVA read images with."""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

# Of blocks, between which the resolution changes.
GROUPS = 4


def convolution(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    """Make one that retains rows and columns."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


def init_by_inputs(model: nn.Module) -> None:
    """Initialise the convolutions of a model by the number of their inputs."""
    for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)


class CodebookBlock(GradientCheckpointingLayer):
    """Four convolutions, narrow in their middle, next to a shortcut: the encoder's."""

    def __init__(self, in_channels: int, out_channels: int, gain: float):
        super().__init__()
        narrow = out_channels // 4
        self.gain = gain
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else convolution(in_channels, out_channels, 1)
        self.conv1 = convolution(in_channels, narrow, 3)
        self.conv2 = convolution(narrow, narrow, 3)
        self.conv3 = convolution(narrow, narrow, 3)
        self.conv4 = convolution(narrow, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            y = conv(y.relu())
        return self.shortcut(x) + self.gain * y


class DecoderBlock(CodebookBlock):
    """The encoder's block, whose small convolution is the first."""

    def __init__(self, in_channels: int, out_channels: int, gain: float):
        super().__init__(in_channels, out_channels, gain)
        self.conv1 = convolution(in_channels, out_channels // 4, 1)
        self.conv4 = convolution(out_channels // 4, out_channels, 3)


class DVAEGroups(nn.Module):
    """A convolution, four groups of blocks with a change of resolution between them, and a convolution.

    Args:
        stem: the first convolution.
        widths: channels of each group.
        depth: blocks of each group.
        block: their kind.
        resample: what changes the resolution.
        out_channels: of the last convolution, of one pixel.
        gain: of the blocks; by default that of so many.
    """

    def __init__(
        self,
        stem: nn.Conv2d,
        widths: Sequence[int],
        depth: int,
        block: type[CodebookBlock],
        resample: nn.Module,
        out_channels: int,
        gain: float | None = None,
    ):
        super().__init__()
        self.stem, self.groups = stem, nn.ModuleList()
        gain = (GROUPS * depth) ** -2 if gain is None else gain
        for i, (before, width) in enumerate(zip([stem.out_channels, *widths], widths, strict=False)):
            blocks = [block(width if j else before, width, gain) for j in range(depth)]
            self.groups.append(nn.Sequential(*blocks, *([resample] if i + 1 < GROUPS else [])))
        self.head = convolution(widths[-1], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H', W')."""
        x = self.stem(x)
        for group in self.groups:
            x = group(x)
        return self.head(x.relu())


def encoder_groups(channels: int, hidden_size: int, depth: int, codes: int, gain: float | None = None) -> DVAEGroups:
    """Make the encoder, (B, channels, H, W) -> (B, codes, H / 8, W / 8), whose groups double their channels."""
    widths, stem = [hidden_size * 2**i for i in range(GROUPS)], convolution(channels, hidden_size, 7)
    return DVAEGroups(stem, widths, depth, CodebookBlock, nn.MaxPool2d(2), codes, gain)


def decoder_groups(codes: int, in_size: int, hidden_size: int, depth: int, channels: int) -> DVAEGroups:
    """Make the decoder, (B, codes, h, w) -> (B, channels, 8 h, 8 w), whose groups halve their channels."""
    widths = [hidden_size * 2**i for i in reversed(range(GROUPS))]
    resample = nn.Upsample(scale_factor=2, mode="nearest")
    return DVAEGroups(convolution(codes, in_size, 1), widths, depth, DecoderBlock, resample, channels)
