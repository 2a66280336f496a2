"""VQGAN (https://arxiv.org/abs/2012.09841): images to codes and back.

Source: https://github.com/patil-suraj/vqgan-jax at 10ef240, whose images are in 0..1, not in -1..1 as those of
https://github.com/CompVis/taming-transformers at 3ba01b2. The loss is of its reconstruction and its codes, without its
perceptual loss and its discriminator.
"""

from dataclasses import dataclass
from math import isqrt
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.models.dalle_mini.configuration_dalle_mini import HfvlmDALLEMiniVQGANConfig
from hfvlm.modules.transformer import Attention

GROUPS = 32
# Of the loss, for latents to stay near their codes.
COMMITMENT = 0.25


@dataclass
class CodecOutput(ModelOutput):
    """Images as codes.

    Args:
        loss: scalar, with `return_loss=True`.
        codes: `(B, h, w)`.
        latents: `(B, C, h, w)`, of which the codes are the nearest; of a dVAE the logits of its codes.
        quantized: `(B, C, h, w)`, the codes' embeddings.
        reconstruction: `(B, 3, H, W)`, about 0..1.
        hidden_states: the input and output of every block.
    """

    loss: Tensor | None = None
    codes: Tensor | None = None
    latents: Tensor | None = None
    quantized: Tensor | None = None
    reconstruction: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def square(codes: Tensor) -> Tensor:
    """Return codes `(B, h, w)`, or `(B, N)` of square images, as `(B, h, w)`.

    Raises:
        ValueError: N is no square.
    """
    if codes.ndim == 3:
        return codes
    edge = isqrt(codes.shape[1])
    if edge**2 != codes.shape[1]:
        raise ValueError(f"{codes.shape[1]} codes are no square image: give them as (B, rows, columns).")
    return codes.unflatten(1, (edge, edge))


def check_codes(codes: Tensor, num_codes: int) -> None:
    """Refuse ids that are no codes, which an embedding would not find."""
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < num_codes:
        raise ValueError(
            f"codes reach from {int(codes.min())} to {int(codes.max())}, the codec has {num_codes}: an image ended "
            "early, or the start token is still there."
        )


def seamless(codes: Tensor) -> Tensor:
    """Lay the codes of images `(n * n, h * w)`, column by column, out as those of one image `(1, n * h, n * w)`."""
    codes = square(codes)
    edge = isqrt(len(codes))
    if edge**2 != len(codes):
        raise ValueError(f"{len(codes)} images are no square grid.")
    return codes.unflatten(0, (edge, edge)).permute(1, 2, 0, 3).flatten(2).flatten(0, 1).unsqueeze(0)


class GroupNorm(nn.GroupNorm):
    """Of 32 groups of channels."""

    def __init__(self, config: HfvlmDALLEMiniVQGANConfig, channels: int):
        super().__init__(GROUPS, channels, eps=config.group_norm_eps)


class ResidualBlock(GradientCheckpointingLayer):
    """Two convolutions of normalised channels, next to a shortcut."""

    def __init__(self, config: HfvlmDALLEMiniVQGANConfig, before: int, channels: int):
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

    def __init__(self, config: HfvlmDALLEMiniVQGANConfig, channels: int):
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
        sizes: dict[str, Any] = {"stride": 2} if down else {"padding": 1}
        self.conv = nn.Conv2d(channels, channels, 3, **sizes) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.down:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            return x if self.conv is None else self.conv(x)
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Blocks of one resolution, each with attention where the level has any, and the way to the next."""

    def __init__(self, config: HfvlmDALLEMiniVQGANConfig, index: int, before: int, *, down: bool):
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

    def __init__(self, config: HfvlmDALLEMiniVQGANConfig, channels: int):
        super().__init__()
        self.block1 = ResidualBlock(config, channels, channels)
        self.mixing = MixingBlock(config, channels)
        self.block2 = ResidualBlock(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.mixing(self.block1(x)))


class VQGANEncoder(nn.Module):
    """(B, 3, H, W) -> (B, latent_channels, H / stride, W / stride)."""

    def __init__(self, config: HfvlmDALLEMiniVQGANConfig):
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

    def __init__(self, config: HfvlmDALLEMiniVQGANConfig):
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


class HfvlmDALLEMiniVQGANModel(HfvlmPreTrainedModel):
    """Turns images into codes and codes into images. Without its encoder, the latter alone."""

    config: HfvlmDALLEMiniVQGANConfig
    base_model_prefix = "codec"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _no_split_modules = ["ResidualBlock", "MixingBlock"]
    _can_record_outputs = {"hidden_states": ResidualBlock}
    _keys_to_ignore_on_load_unexpected = [r"^(text_model|image_decoder)\."]

    def __init__(self, config: HfvlmDALLEMiniVQGANConfig):
        super().__init__(config)
        self.encoder = VQGANEncoder(config) if config.has_encoder else None
        self.to_codes = nn.Conv2d(config.latent_channels, config.code_size, 1) if config.has_encoder else None
        self.codes = nn.Embedding(config.num_codes, config.code_size)
        self.from_codes = nn.Conv2d(config.code_size, config.latent_channels, 1)
        self.decoder = VQGANDecoder(config)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        """Initialise as PyTorch, and as taming-transformers, do."""
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            init.kaiming_uniform_(conv.weight, a=5**0.5)
        init.uniform_(self.codes.weight, -1 / self.config.num_codes, 1 / self.config.num_codes)

    def get_input_embeddings(self) -> nn.Module:
        return self.codes if self.encoder is None else self.encoder.stem

    def latents(self, pixel_values: Tensor) -> Tensor:
        """Encode `(B, 3, H, W)` pixels in 0..1 -> `(B, code_size, h, w)`.

        Raises:
            ValueError: the model has no encoder, or the size is no multiple of its stride.
        """
        if self.encoder is None or self.to_codes is None:
            raise ValueError("This VQGAN has a decoder alone (has_encoder is False); min-dalle's file has no more.")
        stride = self.config.stride
        if pixel_values.shape[2] % stride or pixel_values.shape[3] % stride:
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape[2:])}: rows and columns are multiples of {stride}."
            )
        return self.to_codes(self.encoder(pixel_values.to(self.dtype)))

    def nearest(self, latents: Tensor) -> Tensor:
        """Find the code nearest to each latent, `(B, C, h, w)` -> `(B, h, w)`."""
        every = torch.arange(self.config.num_codes, device=latents.device)
        # Called, since offloaded weights are nowhere until then; in half precision many codes would be equally near.
        z, table = latents.permute(0, 2, 3, 1).float(), self.codes(every).float()
        distances = z.square().sum(-1, keepdim=True) + table.square().sum(-1) - 2 * z @ table.t()
        return distances.argmin(dim=-1)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> CodecOutput:
        """Encode `(B, 3, H, W)` pixels in 0..1, of any size that is a multiple of the stride -> codes and latents."""
        latents = self.latents(pixel_values)
        codes = self.nearest(latents)
        return CodecOutput(codes=codes, latents=latents, quantized=self.codes(codes).permute(0, 3, 1, 2))

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `(B, h, w)`, or `(B, N)` of square images -> `(B, 3, H, W)`, which 0..1 is cut out of.

        Raises:
            ValueError: an id is no code, or N is no square.
        """
        codes = square(codes)
        check_codes(codes, self.config.num_codes)
        return self.decode_latents(self.codes(codes).permute(0, 3, 1, 2))

    def decode_latents(self, quantized: Tensor) -> Tensor:
        """Decode the embeddings of codes, `(B, C, h, w)` -> `(B, 3, H, W)`."""
        return self.decoder(self.from_codes(quantized))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, *, return_loss: bool | None = None, **kwargs: Unpack[Keywords]
    ) -> CodecOutput:
        """Encode and decode `(B, 3, H, W)` pixels in 0..1; gradients pass from the codes to the latents.

        With `return_loss`, compute the image's mean absolute error and the squared distances of latents and codes.
        """
        latents = self.latents(pixel_values)
        codes = self.nearest(latents)
        quantized = self.codes(codes).permute(0, 3, 1, 2)
        straight: Any = quantized.detach() + (latents - latents.detach())
        image, loss = self.decode_latents(straight), None
        if return_loss:
            moved = F.mse_loss(quantized, latents.detach()) + COMMITMENT * F.mse_loss(latents, quantized.detach())
            loss = F.l1_loss(image, pixel_values.to(image.dtype)) + moved
        return CodecOutput(loss=loss, codes=codes, latents=latents, quantized=quantized, reconstruction=image)
