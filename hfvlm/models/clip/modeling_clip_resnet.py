"""CLIP's modified ResNet (https://arxiv.org/abs/2103.00020, part 2.4; https://github.com/openai/CLIP at d05afc4)."""

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.vision import ImageSize, VisionTower
from hfvlm.models.clip.configuration_clip import HfvlmCLIPResNetConfig
from hfvlm.modules.normalization import BatchNorm2d
from hfvlm.modules.positions import BICUBIC, check_positions, resize_grid
from hfvlm.modules.transformer import Attention


class ConvNorm(nn.Module):
    """A convolution without bias, then a batch norm."""

    def __init__(self, in_size: int, out_size: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_size, out_size, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = BatchNorm2d(out_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Stem(nn.Module):
    """Three convolutions, where other ResNets have one, and an average pool: a quarter of the resolution."""

    def __init__(self, config: HfvlmCLIPResNetConfig):
        super().__init__()
        half = config.stem_size // 2
        self.conv1 = ConvNorm(config.num_channels, half, 3, stride=2)
        self.conv2 = ConvNorm(half, half, 3)
        self.conv3 = ConvNorm(half, config.stem_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.avg_pool2d(F.relu(self.conv3(x)), 2)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut. A stride is an average pool, never a strided convolution (anti-aliasing)."""

    def __init__(self, in_size: int, width: int, stride: int):
        super().__init__()
        self.conv1 = ConvNorm(in_size, width, 1)
        self.conv2 = ConvNorm(width, width, 3)
        self.conv3 = ConvNorm(width, width * 4, 1)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.shortcut = ConvNorm(in_size, width * 4, 1) if stride > 1 or in_size != width * 4 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.relu(self.conv3(self.pool(y)) + self.shortcut(self.pool(x)))


class ResNetStage(nn.Sequential):
    """Bottlenecks of one width; the first one may halve the resolution."""

    def __init__(self, in_size: int, width: int, depth: int, stride: int):
        first = Bottleneck(in_size, width, stride)
        super().__init__(first, *(Bottleneck(width * 4, width, 1) for _ in range(1, depth)))


class HfvlmCLIPResNetModel(VisionTower):
    """A ResNet whose feature map is pooled by attention from its mean."""

    config: HfvlmCLIPResNetConfig
    _input_embed_layer = "stem"
    # Recomputing a batch norm in training would count its batch twice in the running statistics.
    supports_gradient_checkpointing = False
    _no_split_modules = ["Bottleneck"]
    _can_record_outputs = {"hidden_states": ResNetStage}

    def __init__(self, config: HfvlmCLIPResNetConfig):
        super().__init__(config)
        width = config.stem_size
        self.stem = Stem(config)
        self.stage1 = ResNetStage(width, width, config.depths[0], stride=1)
        self.stage2 = ResNetStage(width * 4, width * 2, config.depths[1], stride=2)
        self.stage3 = ResNetStage(width * 8, width * 4, config.depths[2], stride=2)
        self.stage4 = ResNetStage(width * 16, width * 8, config.depths[3], stride=2)
        self.position = nn.Parameter(torch.zeros(1 + (config.image_size // 32) ** 2, config.hidden_size))
        self.pool = Attention(config, out_size=config.projection_dim)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Bottleneck):
            init.zeros_(module.conv3.norm.weight)  # each block starts as its shortcut
        elif isinstance(module, Attention):
            for linear in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
                init.normal_(linear.weight, std=self.config.hidden_size**-0.5)

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.position, std=self.config.hidden_size**-0.5)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, C, H, W)` normalised pixels -> the last feature map as tokens `(B, H/32 * W/32, D)`, and the pooled
        output.

        With `interpolate_pos_encoding`, images may have any size; the position table is resized to it.
        """
        x = self.stem(pixel_values.to(self.position.dtype))
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        position: Tensor = self.position
        if interpolate_pos_encoding:
            edge = self.config.image_size // 32
            position = resize_grid(position, (edge, edge), (x.shape[-2], x.shape[-1]), **BICUBIC)
        x = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        check_positions(tokens, position, pixel_values, self.config.image_size)
        tokens = tokens + position
        pooled = self.pool(tokens[:, :1], context=tokens, **kwargs)[0].squeeze(1)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=pooled)

    def resize_positions(self, image_size: ImageSize) -> None:
        """Raise a ValueError: open_clip never resizes these positions for good."""
        raise ValueError("A ResNet keeps its image size; pass interpolate_pos_encoding=True for others.")
