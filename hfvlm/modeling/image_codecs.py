"""Models that turn images into codes, and codes into images."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from hfvlm.modeling.base import HfvlmPreTrainedModel


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


class ImageCodec(HfvlmPreTrainedModel, ABC):
    """Base of models that turn images, in 0..1, into codes and back.

    A subclass encodes checked pixels in `encode`, and in `decode_codes` decodes checked codes. Its configuration has
    `num_codes` and `stride`, the pixels of an image's edge for each code.
    """

    config: Any
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def checked(self, pixel_values: Tensor) -> Tensor:
        """Return pixels `(B, 3, H, W)` in the model's precision.

        Raises:
            ValueError: rows or columns are no multiple of the stride.
        """
        stride = self.config.stride
        if pixel_values.shape[2] % stride or pixel_values.shape[3] % stride:
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape[2:])}: rows and columns are multiples of {stride}."
            )
        return pixel_values.to(self.dtype)

    def checked_codes(self, codes: Tensor) -> Tensor:
        """Return codes `(B, h, w)`, or `(B, N)` of square images, as `(B, h, w)`.

        Raises:
            ValueError: an id is no code, or N is no square.
        """
        codes = square(codes)
        check_codes(codes, self.config.num_codes)
        return codes

    @abstractmethod
    def encode(self, pixel_values: Tensor) -> CodecOutput:
        """Encode `(B, 3, H, W)` pixels in 0..1 -> codes."""

    @abstractmethod
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Decode codes `(B, h, w)` that are checked -> `(B, 3, H, W)`."""

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `(B, h, w)`, or `(B, N)` of square images -> `(B, 3, H, W)`, which 0..1 is cut out of.

        Raises:
            ValueError: an id is no code, or N is no square.
        """
        return self.decode_codes(self.checked_codes(codes))
