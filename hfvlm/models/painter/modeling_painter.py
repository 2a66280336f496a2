"""Painter (Images Speak in Images, https://arxiv.org/abs/2212.02499): a task is shown by one image with its target.

Source: baaivision/Painter at cfec845 (models_painter.py). The output of the layer that averages the tokens of images
and targets still has both, and so do those before it: their features are not among the decoder's.
"""

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import ImageSuperResolutionOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.models.painter.configuration_painter import HfvlmPainterConfig
from hfvlm.modules.embeddings import PatchEmbedding
from hfvlm.modules.positions import BICUBIC_SAMPLED, resize_grid, resize_line
from hfvlm.modules.transformer import MultiHead, PreNormLayer

# Of ImageNet's images, per channel, of values in 0..1: images and targets are both normalised by these.
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A sample counts only if what is shown of its targets, in 0..1, sums up to as much: 100 white pixels.
LEAST_SHOWN = 300.0


class GridAttention(MultiHead):
    """Attention of each patch to all others or, with a `window`, to those in its own square of `window` patches an
    edge; decomposed relative positions (MViTv2, https://arxiv.org/abs/2112.01526) add to the scores."""

    def __init__(self, config: HfvlmPainterConfig, window: int | None = None):
        super().__init__(config, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.window = window
        rows, columns = (window, window) if window else config.grid
        shown = config.use_relative_positions
        self.row_position = nn.Parameter(torch.zeros(2 * rows - 1, self.head_dim)) if shown else None
        self.column_position = nn.Parameter(torch.zeros(2 * columns - 1, self.head_dim)) if shown else None

    def init_own_weights(self, std: float) -> None:
        for position in (self.row_position, self.column_position):
            if position is not None:
                init.zeros_(position)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, grid: tuple[int, int], **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`(B, N, D)`, rows of patches of a `grid` from top to bottom -> the same and, where the implementation has
        them, weights; those of windows are `(B * windows, heads, window ** 2, window ** 2)`."""
        if self.window is None:
            return self.attend_grid(x, grid, **kwargs)
        windows, padded = self.partition(x.unflatten(1, grid), self.window)
        out, weights = self.attend_grid(windows, (self.window, self.window), **kwargs)
        rows, columns = padded[0] // self.window, padded[1] // self.window
        out = out.unflatten(1, (self.window, self.window)).unflatten(0, (-1, rows, columns))
        out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]]
        return out.flatten(1, 2), weights

    @staticmethod
    def partition(x: Tensor, edge: int) -> tuple[Tensor, tuple[int, int]]:
        """Cut `(B, H, W, D)` into windows `(B * windows, edge ** 2, D)`; return also the rows and columns with the
        padding, zeros that are attended to as any patch."""
        rows, columns = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -columns % edge, 0, -rows % edge))
        padded = x.shape[1], x.shape[2]
        x = x.unflatten(2, (-1, edge)).unflatten(1, (-1, edge)).transpose(2, 3)
        return x.flatten(0, 2).flatten(1, 2), padded

    def attend_grid(self, x: Tensor, grid: tuple[int, int], **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend among all of `(B, N, D)`, patches of a grid."""
        query = self.heads(self.q_proj(x))
        return self.mix(query, *self.read(x), self.position_scores(query, grid), **kwargs)

    def position_scores(self, query: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Score queries `(B, heads, N, head_dim)`, which the scale has no part in, against relative positions ->
        `(B, heads, N, N)`."""
        if self.row_position is None or self.column_position is None:
            return None
        query = query.unflatten(2, grid)
        rows = torch.einsum("bnhwc,hkc->bnhwk", query, relative(self.row_position, grid[0]))
        columns = torch.einsum("bnhwc,wkc->bnhwk", query, relative(self.column_position, grid[1]))
        return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(4, 5).flatten(2, 3)


def relative(table: Tensor, length: int) -> Tensor:
    """Look up positions of keys seen from queries on an axis: `(2 * size - 1, D)` -> `(length, length, D)`; the table
    is resized where the axis is longer or shorter than it was made for."""
    if table.shape[0] != 2 * length - 1:
        table = resize_line(table, 2 * length - 1)
    line = torch.arange(length, device=table.device)
    return table[line[:, None] - line + length - 1]


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of `(B, C, H, W)`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResidualBottleneck(nn.Module):
    """x + three convolutions of x, 1, 3 and 1 pixels wide, of half its channels in between (ViTDet)."""

    def __init__(self, config: HfvlmPainterConfig):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.conv1 = nn.Conv2d(size, size // 2, 1, bias=False)
        self.norm1 = ChannelLayerNorm(size // 2, eps=eps)
        self.conv2 = nn.Conv2d(size // 2, size // 2, 3, padding=1, bias=False)
        self.norm2 = ChannelLayerNorm(size // 2, eps=eps)
        self.conv3 = nn.Conv2d(size // 2, size, 1, bias=False)
        self.norm3 = ChannelLayerNorm(size, eps=eps)

    def init_own_weights(self, std: float) -> None:
        init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """`(B, N, D)`, patches of a grid -> the same."""
        y = x.unflatten(1, grid).movedim(-1, 1)
        y = F.gelu(self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(y))))))
        return x + self.norm3(self.conv3(y)).movedim(1, -1).flatten(1, 2)


class PainterLayer(PreNormLayer):
    """A pre-norm layer over a grid of patches, with what may follow it."""

    def __init__(self, config: HfvlmPainterConfig, index: int):
        window = config.window_size if index in config.window_indices else None
        drop_path = config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1)
        super().__init__(config, drop_path, attention=GridAttention(config, window))
        self.residual = ResidualBottleneck(config) if index in config.residual_indices else None

    def forward(self, x: Tensor, grid: tuple[int, int], **kwargs: Any) -> Tensor:  # type: ignore[override]
        """`(B, N, D)`, patches of a grid -> the same."""
        x = super().forward(x, grid=grid, **kwargs)
        return x if self.residual is None else self.residual(x, grid)


class PixelDecoder(nn.Module):
    """Patches to pixels: each patch becomes its pixels' channels, which two convolutions mix."""

    def __init__(self, config: HfvlmPainterConfig):
        super().__init__()
        width, self.patch_size = config.decoder_hidden_size, config.patch_size
        features = config.hidden_size * len(config.intermediate_hidden_state_indices)
        self.projection = nn.Linear(features, config.patch_size**2 * width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = ChannelLayerNorm(width, eps=1e-6)
        self.head = nn.Conv2d(width, config.num_channels, 1)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """`(B, N, features)`, patches of a grid -> normalised pixels `(B, 3, H, W)`."""
        edge = self.patch_size
        x = self.projection(x).unflatten(2, (edge, edge, -1)).unflatten(1, grid)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return self.head(F.gelu(self.norm(self.conv(x))))


class HfvlmPainterModel(HfvlmPreTrainedModel):
    """Images and targets, of which some patches are hidden, to the whole targets."""

    config: HfvlmPainterConfig
    base_model_prefix = "painter"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _input_embed_layer = "patches"
    _no_split_modules = ["PainterLayer"]
    # Scores of positions are added to those of the content: a mask with a value of its own for each pair of patches.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_record_outputs = {
        "hidden_states": PainterLayer,
        "attentions": OutputRecorder(GridAttention, index=1, layer_name="layers"),
    }

    def __init__(self, config: HfvlmPainterConfig):
        super().__init__(config)
        self.edge = config.pretrain_image_size // config.patch_size
        sizes: Any = config
        self.patches = PatchEmbedding(sizes)
        # The first is that of the class token of the pretraining, which there is none of here.
        self.position = nn.Parameter(torch.zeros(1 + self.edge**2, config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.image_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.target_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.layers = nn.ModuleList(PainterLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = PixelDecoder(config)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        for parameter in (self.position, self.mask_token, self.image_token, self.target_token):
            init.normal_(parameter, std=0.02)

    def embed(self, pixel_values: Tensor, target_values: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embed images and targets, `(B, 3, H, W)` each, and where targets are hidden, `(B, N)` -> tokens of all
        images, then of all targets, `(2 * B, N, D)`."""
        images, targets = self.patches(pixel_values), self.patches(target_values)
        targets = torch.where(hidden.unsqueeze(-1), self.mask_token.to(targets.dtype), targets)
        tokens = torch.cat([images + self.image_token, targets + self.target_token])
        return tokens + resize_grid(self.position, (self.edge, self.edge), grid, **BICUBIC_SAMPLED)[1:]

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        target_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        loss_weights: Tensor | None = None,
        *,
        return_loss: bool = False,
        **kwargs: Unpack[Keywords],
    ) -> ImageSuperResolutionOutput:
        """Paint the hidden patches of targets.

        Args:
            pixel_values: `(B, 3, 2 * S, S)`, normalised images, a prompt above a query.
            target_values: `(B, 3, 2 * S, S)`, their targets, normalised as the images are.
            bool_masked_pos: `(B, N)` or `(B, rows, columns)`, 1 where a patch of the targets is hidden; by default all
                of the lower half is.
            loss_weights: `(B, 3, 2 * S, S)`, of the loss at each value of the targets; by default 1.
            return_loss: compute the loss, of the hidden patches.

        Returns:
            `reconstruction` `(B, 3, 2 * S, S)`, normalised: the targets as painted, the query's in the lower half.

        Raises:
            ValueError: images, targets and mask do not fit together.
        """
        grid = self.check_inputs(pixel_values, target_values)
        hidden = self.hidden_patches(pixel_values, bool_masked_pos, grid)
        x = self.embed(pixel_values, target_values, hidden, grid)
        features: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            x = layer(x, grid=grid, **kwargs)
            if index == self.config.merge_index:
                x = torch.stack(x.chunk(2)).mean(dim=0)
            if index in self.config.intermediate_hidden_state_indices:
                features.append(self.norm(x))
        reconstruction = self.decoder(torch.cat(features, dim=-1), grid)
        loss = None
        if return_loss:
            loss = painting_loss(
                reconstruction, target_values, self.hidden_pixels(hidden, grid), loss_weights, self.config.pixel_loss
            )
        return ImageSuperResolutionOutput(loss=loss, reconstruction=reconstruction)

    def check_inputs(self, pixel_values: Tensor, target_values: Tensor) -> tuple[int, int]:
        """Return rows and columns of patches."""
        size, edge = tuple(pixel_values.shape[-2:]), self.config.patch_size
        if size[0] % (2 * edge) or size[1] % edge or pixel_values.shape != target_values.shape:
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape)} and target_values {tuple(target_values.shape)}: both "
                f"must be (B, 3, height, width), two images of one size, of whole patches of {edge} pixels, one above "
                "the other, as the processor makes them."
            )
        return size[0] // edge, size[1] // edge

    def hidden_patches(self, pixel_values: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Return which patches are hidden, `(B, N)`: those of a mask, or the lower half."""
        rows, patches = pixel_values.shape[0], grid[0] * grid[1]
        if mask is None:
            order = torch.arange(patches, device=pixel_values.device)
            return (order >= patches // 2).expand(rows, -1)
        if mask.shape[0] != rows or mask[0].numel() != patches:
            raise ValueError(
                f"bool_masked_pos is {tuple(mask.shape)}: it must have {rows} rows of {patches} patches, {grid[0]} of "
                f"{grid[1]}."
            )
        return mask.flatten(1).bool()

    def hidden_pixels(self, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """`(B, N)` patches -> `(B, 1, H, W)`, 1 for hidden pixels."""
        edge = self.config.patch_size
        pixels = hidden.unflatten(1, grid).repeat_interleave(edge, dim=1).repeat_interleave(edge, dim=2)
        return pixels.unsqueeze(1)


def counted(target: Tensor, hidden: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weights of targets `(B, 3, H, W)`: none in samples whose shown part is black."""
    weights = torch.ones_like(target) if weights is None else weights.to(target.dtype)
    mean, std = (target.new_tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    shown = ((target * std + mean) * ~hidden).sum(dim=(1, 2, 3))
    return weights * (shown >= LEAST_SHOWN)[:, None, None, None]


def painting_loss(painted: Tensor, target: Tensor, hidden: Tensor, weights: Tensor | None, kind: str) -> Tensor:
    """Average the distance of painted pixels `(B, 3, H, W)` to the target over those that are hidden, by weight.

    Args:
        painted: normalised.
        target: normalised.
        hidden: `(B, 1, H, W)`, True where the target is to be painted.
        weights: `(B, 3, H, W)` or None for 1 everywhere.
        kind: one of `PIXEL_LOSSES`.
    """
    wide = torch.promote_types(painted.dtype, torch.float32)
    painted, target = painted.to(wide), target.to(wide)
    weights = counted(target, hidden, weights) * hidden
    return (distances(painted, target, kind) * weights).sum() / (weights.sum() + 1e-2)


def distances(painted: Tensor, target: Tensor, kind: str) -> Tensor:
    """Return the distance of each value, of one of `PIXEL_LOSSES`."""
    if kind == "smooth_l1":
        return F.smooth_l1_loss(painted, target, reduction="none", beta=0.01)
    delta = (painted - target).abs()
    return {"l1": delta, "l2": delta**2, "l1l2": (delta + delta**2) / 2}[kind]
