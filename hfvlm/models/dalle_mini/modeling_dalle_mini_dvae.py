"""OpenAI's discrete VAE (https://arxiv.org/abs/2102.12092; https://github.com/openai/DALL-E at 5be4b23).

DALL-E mini does not use it; its encoder is FLAVA's codebook.
"""

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.models.dalle_mini.configuration_dalle_mini import HfvlmDALLEMiniDVAEConfig
from hfvlm.models.dalle_mini.modeling_dalle_mini_vqgan import CodecOutput, check_codes, square
from hfvlm.models.flava.modeling_flava_codebook import GROUPS, CodebookBlock, convolution

# The logit-Laplace distribution has no pixels nearer to 0 and 1.
MARGIN = 0.1


class DecoderBlock(CodebookBlock):
    """The encoder's block, whose small convolution is the first."""

    def __init__(self, in_channels: int, out_channels: int, gain: float):
        super().__init__(in_channels, out_channels, gain)
        self.conv1 = convolution(in_channels, out_channels // 4, 1)
        self.conv4 = convolution(out_channels // 4, out_channels, 3)


class DVAEHalf(nn.Module):
    """A convolution, four groups of blocks with a change of resolution between them, and a convolution."""

    def __init__(
        self,
        stem: nn.Conv2d,
        widths: list[int],
        depth: int,
        block: type[CodebookBlock],
        resample: nn.Module,
        out_channels: int,
    ):
        super().__init__()
        gain = (GROUPS * depth) ** -2
        self.stem, self.groups = stem, nn.ModuleList()
        for i, (before, width) in enumerate(zip([stem.out_channels, *widths], widths, strict=False)):
            blocks = [block(width if j else before, width, gain) for j in range(depth)]
            self.groups.append(nn.Sequential(*blocks, *([resample] if i + 1 < GROUPS else [])))
        self.head = convolution(widths[-1], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for group in self.groups:
            x = group(x)
        return self.head(x.relu())


class HfvlmDALLEMiniDVAEModel(HfvlmPreTrainedModel):
    """Turns images into codes, an eighth of their rows and columns, and codes into images."""

    config: HfvlmDALLEMiniDVAEConfig
    base_model_prefix = "dvae"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _no_split_modules = ["CodebookBlock", "DecoderBlock"]
    _can_record_outputs = {"hidden_states": CodebookBlock}

    def __init__(self, config: HfvlmDALLEMiniDVAEConfig):
        super().__init__(config)
        growing = [config.hidden_size * 2**i for i in range(GROUPS)]
        shrinking = [config.decoder_hidden_size * 2**i for i in reversed(range(GROUPS))]
        self.encoder = DVAEHalf(
            convolution(config.num_channels, config.hidden_size, 7),
            growing,
            config.blocks_per_group,
            CodebookBlock,
            nn.MaxPool2d(2),
            config.num_codes,
        )
        self.decoder = DVAEHalf(
            convolution(config.num_codes, config.decoder_input_size, 1),
            shrinking,
            config.decoder_blocks_per_group,
            DecoderBlock,
            nn.Upsample(scale_factor=2, mode="nearest"),
            2 * config.num_channels,
        )
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.stem

    def logits(self, pixel_values: Tensor) -> Tensor:
        """Encode `(B, 3, H, W)` pixels in 0..1 -> `(B, num_codes, H / 8, W / 8)`.

        Raises:
            ValueError: the size is no multiple of 8.
        """
        if pixel_values.shape[2] % self.config.stride or pixel_values.shape[3] % self.config.stride:
            raise ValueError(f"pixel_values are {tuple(pixel_values.shape[2:])}: rows and columns are multiples of 8.")
        return self.encoder((1 - 2 * MARGIN) * pixel_values.to(self.dtype) + MARGIN)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> CodecOutput:
        """Encode `(B, 3, H, W)` pixels in 0..1 -> the most likely codes and their logits."""
        logits = self.logits(pixel_values)
        return CodecOutput(codes=logits.argmax(dim=1), latents=logits)

    def statistics(self, codes: Tensor) -> Tensor:
        """Decode codes `(B, h, w)` -> `(B, 6, H, W)`: the location of pixels before the sigmoid, then their scale."""
        codes = square(codes)
        check_codes(codes, self.config.num_codes)
        return self.decoder(F.one_hot(codes, self.config.num_codes).permute(0, 3, 1, 2).to(self.dtype))

    def pixels(self, statistics: Tensor) -> Tensor:
        """Return the likeliest image, in 0..1, of `statistics`."""
        values = statistics[:, : self.config.num_channels].sigmoid()
        return ((values - MARGIN) / (1 - 2 * MARGIN)).clamp(0, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `(B, h, w)`, or `(B, N)` of square images -> `(B, 3, H, W)` in 0..1.

        Raises:
            ValueError: an id is no code, or N is no square.
        """
        return self.pixels(self.statistics(codes))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> CodecOutput:
        """Encode and decode `(B, 3, H, W)` pixels in 0..1; gradients pass from the codes to their probabilities."""
        logits = self.logits(pixel_values)
        codes, soft = logits.argmax(dim=1), logits.softmax(dim=1)
        hard = F.one_hot(codes, self.config.num_codes).permute(0, 3, 1, 2).to(soft.dtype)
        image = self.pixels(self.decoder(hard + (soft - soft.detach())))
        return CodecOutput(codes=codes, latents=logits, reconstruction=image)
