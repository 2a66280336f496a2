"""timm's Swin (https://arxiv.org/abs/2103.14030) and Swin-V2 (https://arxiv.org/abs/2111.09883).

Source: timm 1.0.31, timm/models/swin_transformer.py and swin_transformer_v2.py. On maps of whole windows they compute
what the authors' code and transformers' classes do. Others they shift before they pad them, and windows and shifts are
those of each side.
"""

from itertools import accumulate
from math import log
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.vision import VisionTower
from hfvlm.models.clip.towers.configuration_swin import HfvlmCLIPSwinConfig, HfvlmCLIPSwinV2Config
from hfvlm.modules.dropout import DropPath
from hfvlm.modules.projection import projection
from hfvlm.modules.transformer import MultiHead


def window_pairs(window: tuple[int, int], device: torch.device) -> Tensor:
    """Number the relative positions of every two tokens of a window: `(h * w, h * w)`, row by row of a table of
    `(2 h - 1) (2 w - 1)`."""
    rows, columns = (torch.arange(edge, device=device) for edge in window)
    y, x = (axis.flatten() for axis in torch.meshgrid(rows, columns, indexing="ij"))
    down, right = y.unsqueeze(1) - y + window[0] - 1, x.unsqueeze(1) - x + window[1] - 1
    return down * (2 * window[1] - 1) + right


class WindowAttention(MultiHead):
    """Attention within windows, with a learned bias for each relative position."""

    def __init__(self, config: HfvlmCLIPSwinConfig, stage: int):
        heads = config.num_heads[stage]
        super().__init__(config, width=config.embed_dim * 2**stage, heads=heads)
        self.window = config.window_of(stage)
        self.make_bias(config, stage, heads)

    def make_bias(self, config: HfvlmCLIPSwinConfig, stage: int, heads: int) -> None:
        height, width = self.window
        self.table = nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1), heads))

    def init_own_weights(self, std: float) -> None:
        init.trunc_normal_(self.table, std=std)

    def bias(self) -> Tensor:
        """Return what each head adds, `(heads, h * w, h * w)`."""
        return self.table[window_pairs(self.window, self.table.device)].permute(2, 0, 1)

    def forward(self, x: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(B * windows, h * w, D), (windows, h * w, h * w) or None -> the same."""
        bias = self.bias()
        if mask is not None:
            bias = (bias + mask.unsqueeze(1).to(bias.dtype)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        return self.attend(x, *self.read(x), bias.expand(x.shape[0], -1, -1, -1), **kwargs)


class CosineAttention(WindowAttention):
    """Swin-V2's: cosines of queries and keys at a learned temperature, and a bias that an MLP makes of the logarithms
    of relative positions."""

    # Of the temperature's inverse.
    highest: ClassVar[float] = 100.0

    def make_bias(self, config: Any, stage: int, heads: int) -> None:
        width = config.embed_dim * 2**stage
        self.k_proj = nn.Linear(width, width, bias=False)
        self.pretrained = config.pretrained_windows[stage]
        self.position_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
        self.scale = nn.Parameter(torch.zeros(heads, 1, 1))

    def init_own_weights(self, std: float) -> None:
        init.constant_(self.scale, log(10))

    def bias(self) -> Tensor:
        device, dtype = self.scale.device, self.scale.dtype
        far = [(self.pretrained or edge) - 1 for edge in self.window]
        axes = [
            torch.arange(1 - edge, edge, device=device) * (8 / max(last, 1))
            for edge, last in zip(self.window, far, strict=True)
        ]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        places = places.sign() * (places.abs() + 1).log2() / 3
        table = self.position_mlp(places.to(dtype).flatten(0, 1))
        return 16 * table[window_pairs(self.window, device)].permute(2, 0, 1).sigmoid()

    def read(self, source: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().read(source)
        return F.normalize(key, dim=-1), value

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        scale = self.scale.clamp(max=log(self.highest)).exp() * self.head_dim**0.5
        return super().mix(F.normalize(query, dim=-1) * scale, key, value, mask, *args, **kwargs)


class SwinMLP(nn.Module):
    """Widen, GELU, narrow."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinLayer(GradientCheckpointingLayer):
    """x + f(norm(x)), for attention within windows, which every other layer shifts by half, and MLP."""

    attention_class: ClassVar[type[WindowAttention]] = WindowAttention

    def __init__(self, config: HfvlmCLIPSwinConfig, stage: int, index: int, drop_path: float):
        super().__init__()
        width = config.embed_dim * 2**stage
        self.window = config.window_of(stage)
        half = config.window_size // 2 if index % 2 else 0
        sides = zip(config.map_of(stage), self.window, strict=True)
        self.shift = tuple(half if side > edge else 0 for side, edge in sides)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = self.attention_class(config, stage)
        self.mlp_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = SwinMLP(width, config.mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """(B, H, W, D) -> the same."""
        x = x + self.drop_path(self.windows(self.attention_norm(x), **kwargs))
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))

    def windows(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Attend within the windows of a map (B, H, W, D), which is shifted and then filled up with zeros."""
        height, width = x.shape[1:3]
        down, right = (-size % edge for size, edge in zip((height, width), self.window, strict=True))
        x = F.pad(x.roll([-s for s in self.shift], dims=(1, 2)), (0, 0, 0, right, 0, down))
        rows, columns = x.shape[1] // self.window[0], x.shape[2] // self.window[1]
        mask = self.mask(x.shape[1], x.shape[2], x.device) if any(self.shift) else None
        x = self.attention(self.split(x), mask, **kwargs)[0]
        x = x.unflatten(0, (-1, rows, columns)).unflatten(3, self.window).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, :height, :width].roll(self.shift, dims=(1, 2))

    def split(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> windows (B * windows, h * w, D)."""
        x = x.unflatten(2, (-1, self.window[1])).unflatten(1, (-1, self.window[0])).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2)

    def mask(self, height: int, width: int, device: torch.device) -> Tensor:
        """Make the mask of tokens that the shift has brought together: `(windows, h * w, h * w)`, -100 for them."""
        sides = [
            (place >= size - edge).long() + (place >= size - shift).long() if shift else torch.zeros_like(place)
            for size, edge, shift in zip((height, width), self.window, self.shift, strict=True)
            for place in [torch.arange(size, device=device)]
        ]
        region = self.split((sides[0].unsqueeze(1) * 3 + sides[1]).view(1, height, width, 1)).squeeze(-1)
        return -100.0 * (region.unsqueeze(1) != region.unsqueeze(2))


class SwinV2Layer(SwinLayer):
    """x + norm(f(x)), for attention within windows and MLP."""

    attention_class = CosineAttention

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = x + self.drop_path(self.attention_norm(self.windows(x, **kwargs)))
        return x + self.drop_path(self.mlp_norm(self.mlp(x)))


class Merging(nn.Module):
    """Every four neighbours become one token, of twice the width: (B, H, W, D) -> (B, H/2, W/2, 2 D)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(self.neighbours(x)))

    def neighbours(self, x: Tensor) -> Tensor:
        """Put the tokens of each square of four side by side, zeros where there is none."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        return torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)


class MergingV2(Merging):
    """Swin-V2's, which norms last."""

    def __init__(self, width: int):
        super().__init__(width)
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(self.neighbours(x)))


class SwinStage(nn.Module):
    """What merges the tokens of the stage before, and layers of one width."""

    def __init__(self, merging: nn.Module, layers: list[SwinLayer]):
        super().__init__()
        self.merging = merging
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = self.merging(x)
        for layer in self.layers:
            x = layer(x, **kwargs)
        return x


class HfvlmCLIPSwinModel(VisionTower):
    """timm's Swin: the mean of its last map is pooled."""

    config: HfvlmCLIPSwinConfig
    _input_embed_layer = "patches"
    _no_split_modules = ["SwinLayer", "SwinV2Layer"]
    _can_record_outputs = {"hidden_states": SwinStage}
    # Windows have biases of their own, in a mask that only these take.
    _supports_flash_attn = False
    _supports_flex_attn = False
    layer_class: ClassVar[type[SwinLayer]] = SwinLayer
    merging_class: ClassVar[type[Merging]] = Merging

    def __init__(self, config: HfvlmCLIPSwinConfig):
        super().__init__(config)
        size, width, eps = config.patch_size, config.embed_dim, config.layer_norm_eps
        self.patches = nn.Conv2d(config.num_channels, width, size, stride=size)
        self.patch_norm = nn.LayerNorm(width, eps=eps)
        total, starts = sum(config.depths), [0, *accumulate(config.depths)]
        rates = [config.drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        self.stages = nn.ModuleList(
            SwinStage(
                self.merging_class(width * 2 ** (stage - 1)) if stage else nn.Identity(),
                [self.layer_class(config, stage, i, rates[starts[stage] + i]) for i in range(depth)],
            )
            for stage, depth in enumerate(config.depths)
        )
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=eps)
        self.projection = projection(config, bias=config.projection_bias)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, C, H, W)` normalised pixels of any size -> the last map's tokens after the norm, and the pooled output.

        `interpolate_pos_encoding` changes nothing: positions are those within windows.
        """
        x = self.patches(pixel_values.to(self.patches.weight.dtype)).permute(0, 2, 3, 1)
        x = self.patch_norm(x)
        for stage in self.stages:
            x = stage(x, **kwargs)
        x = self.post_norm(x).flatten(1, 2)
        pooled = x.mean(dim=1)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))


class HfvlmCLIPSwinV2Model(HfvlmCLIPSwinModel):
    """timm's Swin-V2."""

    config: HfvlmCLIPSwinV2Config
    layer_class = SwinV2Layer
    merging_class = MergingV2
