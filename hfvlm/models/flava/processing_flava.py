"""FLAVA's inputs (https://github.com/facebookresearch/multimodal at 3c2a85a, torchmultimodal/transforms)."""

from collections.abc import Collection, Mapping
from random import Random
from typing import Annotated, Any

import numpy as np
from PIL import Image
from transformers.image_processing_base import BatchFeature

from hfvlm.media.images import to_8_bits
from hfvlm.media.resizing import squash
from hfvlm.media.sources import parallel
from hfvlm.models.flava.block_mask import BlockMask
from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.images import CLIP_MEAN, CLIP_STD, FOREIGN_OPTIONS, FixedSizeImageProcessor
from hfvlm.processing.settings import Filter, Flag, Positive, Size, number, or_none, whole
from hfvlm.processing.tokenization import WordPieceTokenizer

# Of DALL-E's logit-Laplace distribution: pixels keep this far from 0 and from 1.
MARGIN = 0.1


class HfvlmFLAVAImageProcessor(FixedSizeImageProcessor):
    """Images as FLAVA's: converted to RGB, then squashed to a square, bicubic; for pretraining also the codebook's
    image, and which patches are masked.

    Args:
        return_codebook_pixels: also give `codebook_pixel_values`, made from the squashed image.
        codebook_size: its `{"height", "width"}` in pixels; one integer means a square.
        codebook_resample: Pillow's filter; 1 is Lanczos.
        return_image_mask: also give `bool_masked_pos`, `(B, rows, columns)`, 1 for masked patches.
        mask_seed: of the masks of a call; None draws other masks each time.
        input_size_patches: rows and columns of patches.
        total_mask_patches: patches to mask.
        mask_group_min_patches: smallest area that is drawn for a rectangle of masked patches.
        mask_group_max_patches: largest; None for `total_mask_patches`.
        mask_group_min_aspect_ratio: of a rectangle's height and width.
        mask_group_max_aspect_ratio: of a rectangle's height and width; None for the inverse of the lowest.
    """

    resize_mode = "squash"
    image_mean = CLIP_MEAN
    image_std = CLIP_STD
    return_codebook_pixels: Flag = False
    codebook_size: Size = {"height": 112, "width": 112}
    codebook_resample: Filter = 1
    return_image_mask: Flag = False
    mask_seed: Annotated[int | None, or_none(whole(0, 2**64))] = None
    input_size_patches: Annotated[int, whole(1, 2**10)] = 14
    total_mask_patches: Annotated[int, whole(0, 2**20)] = 75
    mask_group_min_patches: Annotated[int, whole(1, 2**20)] = 16
    mask_group_max_patches: Annotated[int | None, or_none(whole(1, 2**20))] = None
    mask_group_min_aspect_ratio: Positive = 0.3
    mask_group_max_aspect_ratio: Annotated[float | None, or_none(number(above=0))] = None

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super().checked(settings)
        most = settings["mask_group_max_patches"] or settings["total_mask_patches"]
        highest = settings["mask_group_max_aspect_ratio"] or 1 / settings["mask_group_min_aspect_ratio"]
        if settings["mask_group_min_patches"] > most:
            raise ValueError(f"{type(self).__name__}: mask_group_min_patches must be at most {most} patches.")
        if settings["mask_group_min_aspect_ratio"] > highest:
            raise ValueError(f"{type(self).__name__}: mask_group_min_aspect_ratio must be at most {highest:g}.")
        return settings

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        *,
        allow_urls: bool | Collection[str] = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare images as `HfvlmImageProcessor`; with `return_codebook_pixels`, also `codebook_pixel_values`
        `(B, 3, h, w)`, from 0.1 to 0.9; with `return_image_mask`, also `bool_masked_pos` `(B, rows, columns)`."""
        settings = self.settings_for(kwargs, FOREIGN_OPTIONS)

        def prepared(item: tuple[int, Any]) -> Image.Image:
            return self.fitted(self.read(item, settings, allow_urls), settings, f"image {item[0]}")

        fitted = parallel(prepared, list(enumerate(self.sources(images, kwargs))))
        unchanged = {"do_resize": False, "input_data_format": None}
        data = dict(super().preprocess(fitted, return_tensors, **kwargs | unchanged))
        if settings["return_codebook_pixels"]:
            data["codebook_pixel_values"] = self.codebook_pixels(fitted, settings)
        if settings["return_image_mask"]:
            random = Random(settings["mask_seed"])
            data["bool_masked_pos"] = np.stack([self.patch_mask(settings)(random) for _ in fitted])
        return BatchFeature(data, tensor_type=return_tensors)

    def fitted(self, image: Image.Image, settings: Mapping[str, Any], name: str) -> Image.Image:
        """Return an image in RGB, at the model's size."""
        image = to_8_bits(image, name).convert("RGB")
        return self.resize(image, settings) if settings["do_resize"] else image

    def codebook_pixels(self, images: list[Image.Image], settings: Mapping[str, Any]) -> np.ndarray:
        """Prepare images in RGB for the codebook -> `(B, 3, h, w)`, float32."""
        size = (settings["codebook_size"]["height"], settings["codebook_size"]["width"])

        def pixels(image: Image.Image) -> np.ndarray:
            array = np.asarray(squash(image, size, settings["codebook_resample"])).transpose(2, 0, 1)
            return array.astype(np.float32, order="C") / 255 * np.float32(1 - 2 * MARGIN) + np.float32(MARGIN)

        return np.stack(parallel(pixels, images))

    def patch_mask(self, settings: Mapping[str, Any]) -> BlockMask:
        """Make the mask that draws which patches are hidden from the model."""
        edge = settings["input_size_patches"]
        return BlockMask(
            rows=edge,
            columns=edge,
            total=settings["total_mask_patches"],
            least=settings["mask_group_min_patches"],
            most=settings["mask_group_max_patches"],
            lowest_aspect=settings["mask_group_min_aspect_ratio"],
            highest_aspect=settings["mask_group_max_aspect_ratio"],
        )


class HfvlmFLAVATokenizer(WordPieceTokenizer):
    """BERT's word pieces in lower case, padded to 77: the multimodal encoder was trained on padding, unmasked.

    `from_vocabulary` reads bert-base-uncased's `vocab.txt`, or a tokenizer.json of the same pieces.
    """

    default_padding = "max_length"
    DEFAULTS = {**WordPieceTokenizer.DEFAULTS, "model_max_length": 77}


class HfvlmFLAVAProcessor(DualEncoderProcessor):
    """Images and texts to FLAVA's inputs: `processor(images=..., text=...)`, then `model(**inputs)`."""
