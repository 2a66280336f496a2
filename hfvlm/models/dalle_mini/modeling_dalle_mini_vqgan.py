"""VQGAN (https://arxiv.org/abs/2012.09841): images to codes and back.

Source: https://github.com/patil-suraj/vqgan-jax at 10ef240, whose images are in 0..1, not in -1..1 as those of
https://github.com/CompVis/taming-transformers at 3ba01b2. The loss is of its reconstruction and its codes, without its
perceptual loss and its discriminator.
"""

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.image_codecs import CodecOutput, ImageCodec
from hfvlm.modeling.keywords import Keywords
from hfvlm.models.dalle_mini.configuration_dalle_mini import HfvlmDALLEMiniVQGANConfig
from hfvlm.modules.vqgan import ResidualBlock, VQGANDecoder, VQGANEncoder

# Of the loss, for latents to stay near their codes.
COMMITMENT = 0.25


class HfvlmDALLEMiniVQGANModel(ImageCodec):
    """Turns images into codes and codes into images. Without its encoder, the latter alone."""

    config: HfvlmDALLEMiniVQGANConfig
    base_model_prefix = "codec"
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
        return self.to_codes(self.encoder(self.checked(pixel_values)))

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

    def decode_codes(self, codes: Tensor) -> Tensor:
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
