"""Masks as sixteen codes, and back: the VQ-VAE behind <seg000> to <seg127> (https://arxiv.org/abs/2301.02229).

Source: https://github.com/google-research/big_vision at 0127fb6, pp/proj/paligemma/segmentation.py and
evaluators/proj/paligemma/transfers/segmentation.py, which have no training.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.models.paligemma.configuration_paligemma import HfvlmPaliGemmaMaskConfig


@dataclass
class MaskOutput(ModelOutput):
    """Masks and their codes.

    Args:
        loss: reconstruction, codebook and commitment (https://arxiv.org/abs/1711.00937), with `return_loss`.
        codes: `(B, 16)`, the indices of the codes, row by row of 4 x 4.
        masks: `(B, 64, 64)`, reconstructed, positive inside.
        features: `(B, code_dim, 4, 4)`, what the codes are nearest to.
    """

    loss: Tensor | None = None
    codes: Tensor | None = None
    masks: Tensor | None = None
    features: Tensor | None = None


class MaskResidual(nn.Module):
    """Two convolutions of 3 x 3 and one of 1 x 1, added to their input."""

    def __init__(self, width: int):
        super().__init__()
        layers = [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class HfvlmPaliGemmaMaskModel(HfvlmPreTrainedModel):
    """An autoencoder of masks, whose code is sixteen of `num_codes` vectors."""

    config: HfvlmPaliGemmaMaskConfig
    base_model_prefix = "mask_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = False
    _no_split_modules = ["MaskResidual"]
    _can_record_outputs = {}

    def __init__(self, config: HfvlmPaliGemmaMaskConfig):
        super().__init__(config)
        down, up = list(config.encoder_channels), list(config.decoder_channels)
        halving = [
            layer
            for before, after in zip([1, *down[:-1]], down, strict=True)
            for layer in (nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU())
        ]
        doubling = [
            layer
            for before, after in pairwise(up)
            for layer in (nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU())
        ]
        ends = MaskResidual(down[-1]), MaskResidual(down[-1])
        self.encoder = nn.Sequential(*halving, *ends, nn.Conv2d(down[-1], config.code_dim, 1))
        begins = nn.Conv2d(config.code_dim, up[0], 1), nn.ReLU(), MaskResidual(up[0]), MaskResidual(up[0])
        self.decoder = nn.Sequential(*begins, *doubling, nn.Conv2d(up[-1], 1, 1))
        self.codes = nn.Parameter(torch.zeros(config.num_codes, config.code_dim))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder[0]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            init.kaiming_normal_(module.weight)

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.codes, std=1.0)

    def features(self, masks: Tensor) -> Tensor:  # type: ignore[override]
        """Encode masks `(B, 64, 64)`, 0 outside and 1 inside -> `(B, code_dim, 4, 4)`."""
        return self.encoder(2.0 * (masks.unsqueeze(1) - 0.5))

    def nearest(self, features: Tensor) -> Tensor:
        """Find the code nearest to each of the features `(B, code_dim, 4, 4)` -> `(B, 16)`."""
        flat = features.flatten(2).transpose(1, 2)
        distances = (flat**2).sum(-1, keepdim=True) + (self.codes**2).sum(-1) - 2 * flat @ self.codes.t()
        return distances.argmin(dim=-1)

    def vectors(self, codes: Tensor) -> Tensor:
        """Look up codes `(B, 16)` -> `(B, code_dim, 4, 4)`."""
        return self.codes[codes].transpose(1, 2).unflatten(2, (4, 4))

    def decode(self, vectors: Tensor) -> Tensor:
        """Decode vectors `(B, code_dim, 4, 4)` to masks `(B, 64, 64)`, positive inside."""
        return self.decoder(vectors).squeeze(1)

    @torch.no_grad()
    def encode_masks(self, masks: Tensor) -> Tensor:
        """Encode masks `(B, 64, 64)`, 0 outside and 1 inside -> codes `(B, 16)`."""
        return self.nearest(self.features(masks))

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Decode codes `(B, 16)` to masks `(B, 64, 64)`, positive inside."""
        return self.decode(self.vectors(codes))

    @can_return_tuple
    def forward(self, pixel_values: Tensor, *, return_loss: bool = False, **kwargs: Unpack[Keywords]) -> MaskOutput:
        """Encode masks and decode their codes; gradients pass through the codes to the encoder.

        Args:
            pixel_values: `(B, 64, 64)`, 0 outside and 1 inside.
            return_loss: compute the loss.
            **kwargs: of transformers.
        """
        if pixel_values.ndim != 3 or tuple(pixel_values.shape[1:]) != (64, 64):
            raise ValueError(f"pixel_values has the shape {tuple(pixel_values.shape)}: masks are (B, 64, 64).")
        features = self.features(pixel_values)
        codes = self.nearest(features)
        vectors = self.vectors(codes)
        masks = self.decode(features + (vectors - features).detach())
        loss = None
        if return_loss:
            loss = F.mse_loss(masks, 2.0 * (pixel_values - 0.5)) + F.mse_loss(vectors, features.detach())
            loss = loss + self.config.commitment * F.mse_loss(features, vectors.detach())
        return MaskOutput(loss=loss, codes=codes, masks=masks, features=features)
