"""SigLIP's inputs (https://github.com/google-research/big_vision at 0127fb6; open_clip at 89fb801)."""

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from transformers.image_processing_base import BatchFeature

from hfvlm.media.resizing import squash
from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.images import FixedSizeImageProcessor, HfvlmImageProcessor
from hfvlm.processing.settings import whole
from hfvlm.processing.tokenization import FullLengthTokenizer
from hfvlm.processing.vocabularies import sentencepiece


class HfvlmSigLIPImageProcessor(FixedSizeImageProcessor):
    """Images squashed to a square, bicubic, values from -1 to 1."""

    resize_mode = "squash"


class HfvlmSigLIPNaFlexImageProcessor(HfvlmImageProcessor):
    """Images as patches that keep their aspect ratio, bilinear, values from -1 to 1 (SigLIP 2 NaFlex).

    Args:
        patch_size: edge of a patch in pixels.
        max_num_patches: an image becomes as many patches as fit, and is padded to this number.
    """

    model_input_names = ["pixel_values", "pixel_attention_mask", "spatial_shapes"]

    resample = 2
    patch_size: Annotated[int, whole(1, 2**10)] = 16
    max_num_patches: Annotated[int, whole(1, 2**20)] = 256

    def resize(self, image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
        rows, columns = fitting_grid(image.height, image.width, settings["patch_size"], settings["max_num_patches"])
        return squash(image, (rows * settings["patch_size"], columns * settings["patch_size"]), settings["resample"])

    def batch(self, arrays: list[np.ndarray], settings: Mapping[str, Any], return_tensors: str | None) -> BatchFeature:
        """Make `pixel_values` `(B, N, patch_size * patch_size * 3)`, `pixel_attention_mask` `(B, N)` and
        `spatial_shapes` `(B, 2)` as rows and columns."""
        size, length = settings["patch_size"], settings["max_num_patches"]
        patches = np.zeros((len(arrays), length, 3 * size * size), dtype=np.float32)
        mask = np.zeros((len(arrays), length), dtype=np.int64)
        shapes = np.array([(array.shape[1] // size, array.shape[2] // size) for array in arrays])
        for i, (array, (rows, columns)) in enumerate(zip(arrays, shapes, strict=True)):
            if rows * columns > length or array.shape[1:] != (rows * size, columns * size):
                raise ValueError(
                    f"image {i} of {array.shape[1]} x {array.shape[2]} pixels is not made of at most {length} "
                    f"patches of {size} x {size}: leave do_resize on, or raise max_num_patches."
                )
            grid = array.reshape(3, rows, size, columns, size).transpose(1, 3, 2, 4, 0)
            patches[i, : rows * columns] = grid.reshape(rows * columns, -1)
            mask[i, : rows * columns] = 1
        data = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        return BatchFeature(data, tensor_type=return_tensors)


def fitting_grid(height: int, width: int, patch_size: int, most: int) -> tuple[int, int]:
    """Return rows and columns of the largest image of about this aspect ratio with at most `most` patches.

    A bisection over the scale, in the original's steps and to its precision, since the result depends on both.
    """
    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        rows, columns = (max(1, ceil(edge * scale / patch_size)) for edge in (height, width))
        low, high = (scale, high) if rows * columns <= most else (low, scale)
    return max(1, ceil(height * low / patch_size)), max(1, ceil(width * low / patch_size))


class HfvlmSigLIPTokenizer(FullLengthTokenizer):
    """Sentencepiece, always padded to `model_max_length`: the model reads the last position and was trained without
    a mask."""

    model_input_names = ["input_ids"]
    DEFAULTS = {"clean": "canonical", "model_max_length": 64}

    @classmethod
    def from_vocabulary(cls, path: str | Path, **kwargs: Any) -> "HfvlmSigLIPTokenizer":
        """Make a tokenizer from a sentencepiece `.model` or its tokenizer.json.

        It pads with the end token as SigLIP 1; SigLIP 2 has a `pad_token` of its own.
        """
        engine = sentencepiece(path)
        end = engine.id_to_token(1)
        return cls(tokenizer_object=engine, **{"eos_token": end, "pad_token": end} | kwargs)


class HfvlmSigLIPProcessor(DualEncoderProcessor):
    """Images and texts to SigLIP's inputs: `processor(images=..., text=...)`, then `model(**inputs)`."""
