"""OpenAI's discrete VAE (https://arxiv.org/abs/2102.12092; https://github.com/openai/DALL-E at 5be4b23).

DALL-E mini does not use it; its encoder is FLAVA's codebook.
"""

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.image_codecs import CodecOutput, ImageCodec
from hfvlm.modeling.keywords import Keywords
from hfvlm.models.dalle_mini.configuration_dalle_mini import HfvlmDALLEMiniDVAEConfig
from hfvlm.modules.dvae import CodebookBlock, decoder_groups, encoder_groups, init_by_inputs

# The logit-Laplace distribution has no pixels nearer to 0 and 1.
MARGIN = 0.1


class HfvlmDALLEMiniDVAEModel(ImageCodec):
    """Turns images into codes, an eighth of their rows and columns, and codes into images."""

    config: HfvlmDALLEMiniDVAEConfig
    base_model_prefix = "dvae"
    _no_split_modules = ["CodebookBlock", "DecoderBlock"]
    _can_record_outputs = {"hidden_states": CodebookBlock}

    def __init__(self, config: HfvlmDALLEMiniDVAEConfig):
        super().__init__(config)
        codes, channels = config.num_codes, config.num_channels
        self.encoder = encoder_groups(channels, config.hidden_size, config.blocks_per_group, codes)
        # Of each number of a pixel it gives a location and a scale.
        sizes = config.decoder_input_size, config.decoder_hidden_size, config.decoder_blocks_per_group, 2 * channels
        self.decoder = decoder_groups(codes, *sizes)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        init_by_inputs(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.stem

    def logits(self, pixel_values: Tensor) -> Tensor:
        """Encode `(B, 3, H, W)` pixels in 0..1 -> `(B, num_codes, H / 8, W / 8)`.

        Raises:
            ValueError: the size is no multiple of 8.
        """
        return self.encoder((1 - 2 * MARGIN) * self.checked(pixel_values) + MARGIN)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> CodecOutput:
        """Encode `(B, 3, H, W)` pixels in 0..1 -> the most likely codes and their logits."""
        logits = self.logits(pixel_values)
        return CodecOutput(codes=logits.argmax(dim=1), latents=logits)

    def statistics(self, codes: Tensor) -> Tensor:
        """Decode codes `(B, h, w)` -> `(B, 6, H, W)`: the location of pixels before the sigmoid, then their scale."""
        return self.decoder(self.one_hot(self.checked_codes(codes)))

    def one_hot(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> (B, num_codes, h, w)."""
        return F.one_hot(codes, self.config.num_codes).permute(0, 3, 1, 2).to(self.dtype)

    def pixels(self, statistics: Tensor) -> Tensor:
        """Return the likeliest image, in 0..1, of `statistics`."""
        values = statistics[:, : self.config.num_channels].sigmoid()
        return ((values - MARGIN) / (1 - 2 * MARGIN)).clamp(0, 1)

    def decode_codes(self, codes: Tensor) -> Tensor:
        return self.pixels(self.decoder(self.one_hot(codes)))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> CodecOutput:
        """Encode and decode `(B, 3, H, W)` pixels in 0..1; gradients pass from the codes to their probabilities."""
        logits = self.logits(pixel_values)
        codes, soft = logits.argmax(dim=1), logits.softmax(dim=1)
        image = self.pixels(self.decoder(self.one_hot(codes) + (soft - soft.detach())))
        return CodecOutput(codes=codes, latents=logits, reconstruction=image)
