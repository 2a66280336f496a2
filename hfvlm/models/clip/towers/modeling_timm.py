"""Vision transformers that open_clip takes from timm, written out: CLIP's own, EVA-CLIP's and the Perception
Encoder's.

EVA-CLIP: https://arxiv.org/abs/2303.15389; EVA-02: https://arxiv.org/abs/2303.11331; Perception Encoder:
https://arxiv.org/abs/2504.13181. Source: timm 1.0.31, timm/models/eva.py and vision_transformer.py, as open_clip at
89fb801 builds them.
"""

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.timm_trunks import HfvlmTimmTrunkConfig, HfvlmTimmTrunkModel  # noqa: F401 (CLIP registers them)
from hfvlm.modeling.vision import ClassTokenTower, PatchTower
from hfvlm.models.clip.towers.configuration_timm import (
    HfvlmCLIPEVA02Config,
    HfvlmCLIPEVAConfig,
    HfvlmCLIPEVAPostNormConfig,
    HfvlmCLIPPEConfig,
    HfvlmCLIPPEGiganticConfig,
    HfvlmCLIPViTConfig,
    RotaryVisionConfig,
    TimmVisionConfig,
)
from hfvlm.modules.pooling import AttentionPool, FirstToken
from hfvlm.modules.projection import projection
from hfvlm.modules.transformer import Attention, PreNormLayer, Stack

# Base of the rotary frequencies.
THETA = 10000.0


class KeylessBiasAttention(Attention):
    """Attention whose keys have no bias: BEiT's, and so EVA's."""

    def __init__(self, config: TimmVisionConfig):
        super().__init__(config)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by its angle.

    Args:
        x: `(B, heads, N, head_dim)`.
        rotation: `(B or 1, N, head_dim)`, the cosines of the pairs' angles, then the sines.
    """
    cos, sin = rotation.unsqueeze(1).chunk(2, dim=-1)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).type_as(x)


class RotaryAttention(Attention):
    """Attention whose queries and keys are turned by where they are."""

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, *, rotation: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As `Attention`; `rotation`, `(B or 1, M, head_dim)`, is that of all tokens, the first of which are `x`."""
        key, value = self.read(x if context is None else context)
        query = rotate(self.heads(self.q_proj(x)), rotation[:, : x.shape[1]])
        return self.mix(query, rotate(key, rotation), value, mask, **kwargs)


class SubNormAttention(RotaryAttention):
    """Rotary attention without a bias of its keys, with a norm before the output projection: sub-LN."""

    def __init__(self, config: RotaryVisionConfig):
        super().__init__(config)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def join(self, x: Tensor) -> Tensor:
        return self.out_proj(self.norm(x))


class SwiGLU(nn.Module):
    """Widen twice, one of the two gated by the other's SiLU, norm, narrow: sub-LN."""

    def __init__(self, config: RotaryVisionConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(self.norm(F.silu(self.gate(x)) * self.fc1(x)))


class EVALayer(PreNormLayer):
    """EVA-01-CLIP's layer."""

    def __init__(self, config: TimmVisionConfig, drop_path: float):
        super().__init__(config, drop_path, KeylessBiasAttention(config))


class EVAPostNormLayer(EVALayer):
    """x + norm(f(x)), for attention and MLP."""

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, N, D), (B, 1, N, M) or None, (B, M, D) -> (B, N, D); `context` are all tokens where `x` are some."""
        attended, _ = self.attention(x, mask, context, **kwargs)
        x = x + self.drop_path(self.attention_norm(attended))
        return x + self.drop_path(self.mlp_norm(self.mlp(x)))


class EVA02Layer(PreNormLayer):
    """EVA-02-CLIP's layer."""

    def __init__(self, config: RotaryVisionConfig, drop_path: float):
        super().__init__(config, drop_path, SubNormAttention(config), SwiGLU(config))


class PELayer(PreNormLayer):
    """The Perception Encoder's layer."""

    def __init__(self, config: RotaryVisionConfig, drop_path: float):
        super().__init__(config, drop_path, RotaryAttention(config))


class TimmTower(PatchTower):
    """Base of the towers: positions, layers, a last norm, pooling, and a projection with a bias.

    Attributes:
        layer_class: made of the configuration and its rate of stochastic depth.
        first_norm: class of the norm before the layers; Identity for none.
    """

    layer_class: ClassVar[type[PreNormLayer]]
    first_norm: ClassVar[type[nn.Module]] = nn.Identity

    _no_split_modules = ["PreNormLayer", "EVALayer", "EVAPostNormLayer", "EVA02Layer", "PELayer"]

    def __init__(self, config: Any):
        super().__init__(config)
        width, depth, eps = config.hidden_size, config.num_hidden_layers, config.layer_norm_eps
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.pre_norm = self.first_norm(width, eps=eps)
        self.layers = Stack(self.layer_class(config, rate) for rate in rates)
        self.post_norm = nn.LayerNorm(width, eps=eps)
        self.pool = self.make_pool()
        self.projection = projection(config, bias=True)
        self.post_init()

    def make_pool(self) -> nn.Module:
        """Make the module that turns tokens `(B, N, D)` into the pooled output `(B, D)`."""
        return FirstToken()

    def init_own_weights(self, std: float) -> None:
        super().init_own_weights(std)
        layers: Any = self.layers
        for i, layer in enumerate(layers, start=1):
            # As BEiT: what a layer adds shrinks with its depth.
            init.normal_(layer.attention.out_proj.weight, std=std / (2 * i) ** 0.5)
            init.normal_(layer.mlp.fc2.weight, std=std / (2 * i) ** 0.5)

    def inputs(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool) -> tuple[Tensor, dict[str, Any]]:
        """Embed pixels as `embed`, and return what the layers take beside the tokens."""
        return self.embed(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding), {}

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        *,
        interpolate_pos_encoding: bool = False,
        until: int | None = None,
        **kwargs: Unpack[Keywords],
    ) -> TowerOutput:
        """`(B, C, H, W)` normalised pixels -> all tokens after the last norm, class token first where there is one,
        and the pooled output.

        With `interpolate_pos_encoding`, images may have any size; the position table is resized to it. With `until`,
        the tokens are `hidden_states[until]`, and nothing is computed that comes after them: nothing is pooled.
        """
        x, along = self.inputs(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        x = self.pre_norm(x)
        if until is not None:
            return TowerOutput(last_hidden_state=self.layers.until(x, until, **along, **kwargs))
        x = self.post_norm(self.layers(x, **along, **kwargs))
        pooled = self.pool(x, **kwargs)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))

    def unused(self, until: int) -> list[str]:
        """Names of the modules that `hidden_states[until]` does not depend on."""
        depth = self.layers.depth_of(until)
        return [*(f"layers.{i}" for i in range(depth, len(self.layers))), "post_norm", "pool", "projection"]


class HfvlmCLIPViTModel(TimmTower, ClassTokenTower):
    """CLIP's vision transformer, with a bias of its projection: MobileCLIP2-L-14."""

    config: HfvlmCLIPViTConfig
    patch_bias = False
    pools_one_token = True
    layer_class = PreNormLayer
    first_norm = nn.LayerNorm


class HfvlmCLIPEVAModel(TimmTower, ClassTokenTower):
    """EVA-01-CLIP's vision transformer."""

    config: HfvlmCLIPEVAConfig
    pools_one_token = True
    layer_class = EVALayer


class HfvlmCLIPEVAPostNormModel(TimmTower, ClassTokenTower):
    """EVA-02-CLIP-E's vision transformer."""

    config: HfvlmCLIPEVAPostNormConfig
    pools_one_token = True
    layer_class = EVAPostNormLayer


class RotaryTower(TimmTower):
    """Base of the towers whose patches have rotary positions beside the learned ones.

    Attributes:
        first_coordinate: of the first row and column of patches; tokens before the patches are not turned.
        axes: which of rows, 0, and columns, 1, turn the first half of a head's channels, and which the second.
    """

    first_coordinate: ClassVar[int] = 0
    axes: ClassVar[tuple[int, int]] = (0, 1)

    def inputs(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool) -> tuple[Tensor, dict[str, Any]]:
        x = self.with_positions(
            self.patches(pixel_values), pixel_values, interpolate_pos_encoding=interpolate_pos_encoding
        )
        height, width = pixel_values.shape[-2:]
        rotation = self.rotation(self.patch_grid(height, width), x.device)
        kept = self.patch_dropout.choose(x)
        if kept is not None:
            x, rotation = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1])), rotation[0][kept]
        return x, {"rotation": rotation}

    def rotation(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Compute the rotation of all tokens of an image with so many rows and columns of patches, in float32: `(1, N,
        head_dim)`; see `rotate`."""
        quarter = self.config.hidden_size // self.config.num_attention_heads // 4
        lines = [
            (torch.arange(length, device=device).float() + self.first_coordinate)
            / length
            * self.config.reference_grid_size
            for length in grid
        ]
        coordinates = torch.meshgrid(*lines, indexing="ij")
        frequencies = THETA ** (-torch.arange(quarter, device=device).float() / quarter)
        angles = [coordinates[axis].flatten().unsqueeze(-1) * frequencies for axis in self.axes]
        turned = F.pad(torch.cat(angles, dim=-1), (0, 0, self.num_prefix_tokens, 0))
        return torch.cat([turned.cos(), turned.sin()], dim=-1).unsqueeze(0)


class HfvlmCLIPEVA02Model(RotaryTower, ClassTokenTower):
    """EVA-02-CLIP's vision transformer at sizes B and L."""

    config: HfvlmCLIPEVA02Config
    pools_one_token = True
    layer_class = EVA02Layer


class HfvlmCLIPPEGiganticModel(RotaryTower):
    """The Perception Encoder's vision transformer without a class token, pooled by attention over all tokens."""

    config: HfvlmCLIPPEGiganticConfig
    patch_bias = False
    layer_class = PELayer
    first_norm = nn.LayerNorm
    first_coordinate = 1
    axes = (1, 0)

    def make_pool(self) -> nn.Module:
        return AttentionPool(self.config, self.config.pool_heads, self.config.pool_intermediate_size)


class HfvlmCLIPPEModel(HfvlmCLIPPEGiganticModel, ClassTokenTower):
    """The Perception Encoder's vision transformer."""

    config: HfvlmCLIPPEConfig  # type: ignore[assignment]
