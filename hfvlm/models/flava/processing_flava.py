"""What FLAVA is fed (https://github.com/facebookresearch/multimodal at 3c2a85a, torchmultimodal/transforms)."""

from collections.abc import Collection, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, normalizers
from transformers.image_processing_base import BatchFeature

from hfvlm.media.images import to_8_bits
from hfvlm.media.resizing import squash
from hfvlm.media.sources import parallel
from hfvlm.models.flava.block_mask import BlockMask
from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.images import FOREIGN_OPTIONS, FixedSizeImageProcessor
from hfvlm.processing.settings import flag, number, or_none, rectangle, resample, whole
from hfvlm.processing.tokenization import HfvlmTokenizer
from hfvlm.processing.vocabularies import wordpiece

# Of DALL-E's logit-Laplace distribution: pixels keep this far from 0 and from 1.
MARGIN = 0.1


class HfvlmFLAVAImageProcessor(FixedSizeImageProcessor):
    """Pictures as FLAVA reads them: converted to RGB, then squashed to a square, bicubic; for pretraining also the
    picture that the codebook reads, and which patches are hidden.

    Args:
        return_codebook_pixels: also give `codebook_pixel_values`, made from the squashed picture.
        codebook_size: its `{"height", "width"}` in pixels; one integer means a square.
        codebook_resample: Pillow's filter; 1 is Lanczos.
        return_image_mask: also give `bool_masked_pos`, `(B, rows, columns)`, 1 for hidden patches.
        mask_seed: of the masks of a call; None takes other masks each time.
        input_size_patches: rows and columns of patches.
        total_mask_patches: patches to hide.
        mask_group_min_patches: smallest area that is drawn for a rectangle of hidden patches.
        mask_group_max_patches: largest; None for `total_mask_patches`.
        mask_group_min_aspect_ratio: of a rectangle's height and width.
        mask_group_max_aspect_ratio: of a rectangle's height and width; None for the inverse of the lowest.
    """

    SETTINGS = (
        *FixedSizeImageProcessor.SETTINGS,
        "return_codebook_pixels",
        "codebook_size",
        "codebook_resample",
        "return_image_mask",
        "mask_seed",
        "input_size_patches",
        "total_mask_patches",
        "mask_group_min_patches",
        "mask_group_max_patches",
        "mask_group_min_aspect_ratio",
        "mask_group_max_aspect_ratio",
    )
    CHECKS = {
        **FixedSizeImageProcessor.CHECKS,
        "return_codebook_pixels": flag,
        "codebook_size": rectangle,
        "codebook_resample": resample,
        "return_image_mask": flag,
        "mask_seed": or_none(whole(0, 2**64)),
        "input_size_patches": whole(1, 2**10),
        "total_mask_patches": whole(0, 2**20),
        "mask_group_min_patches": whole(1, 2**20),
        "mask_group_max_patches": or_none(whole(1, 2**20)),
        "mask_group_min_aspect_ratio": number(above=0),
        "mask_group_max_aspect_ratio": or_none(number(above=0)),
    }

    resize_mode = "squash"
    image_mean = [0.48145466, 0.4578275, 0.40821073]
    image_std = [0.26862954, 0.26130258, 0.27577711]
    return_codebook_pixels: bool = False
    codebook_size: dict[str, int] = {"height": 112, "width": 112}
    codebook_resample: int = 1
    return_image_mask: bool = False
    mask_seed: int | None = None
    input_size_patches: int = 14
    total_mask_patches: int = 75
    mask_group_min_patches: int = 16
    mask_group_max_patches: int | None = None
    mask_group_min_aspect_ratio: float = 0.3
    mask_group_max_aspect_ratio: float | None = None

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
        """As `HfvlmImageProcessor`; `codebook_pixel_values` `(B, 3, h, w)`, from 0.1 to 0.9, and `bool_masked_pos`
        `(B, rows, columns)` come with what asks for them."""
        settings = self.settings_for(kwargs, FOREIGN_OPTIONS)

        def prepared(item: tuple[int, Any]) -> Image.Image:
            return self.fitted(self.read(item, settings, allow_urls), settings, f"image {item[0]}")

        pictures = parallel(prepared, list(enumerate(self.sources(images, kwargs))))
        unchanged = {"do_resize": False, "input_data_format": None}
        data = dict(super().preprocess(pictures, return_tensors, **kwargs | unchanged))
        if settings["return_codebook_pixels"]:
            data["codebook_pixel_values"] = self.codebook_pixels(pictures, settings)
        if settings["return_image_mask"]:
            random = Random(settings["mask_seed"])
            data["bool_masked_pos"] = np.stack([self.patch_mask(settings)(random) for _ in pictures])
        return BatchFeature(data, tensor_type=return_tensors)

    def fitted(self, image: Image.Image, settings: Mapping[str, Any], name: str) -> Image.Image:
        image = to_8_bits(image, name).convert("RGB")
        return self.resize(image, settings) if settings["do_resize"] else image

    def codebook_pixels(self, pictures: list[Image.Image], settings: Mapping[str, Any]) -> np.ndarray:
        """Pictures in RGB -> (B, 3, h, w), float32, what the codebook reads."""
        size = (settings["codebook_size"]["height"], settings["codebook_size"]["width"])

        def pixels(picture: Image.Image) -> np.ndarray:
            array = np.asarray(squash(picture, size, settings["codebook_resample"])).transpose(2, 0, 1)
            return array.astype(np.float32, order="C") / 255 * np.float32(1 - 2 * MARGIN) + np.float32(MARGIN)

        return np.stack(parallel(pixels, pictures))

    def patch_mask(self, settings: Mapping[str, Any]) -> BlockMask:
        """Draws which patches are hidden."""
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


class HfvlmFLAVATokenizer(HfvlmTokenizer):
    """BERT's word pieces in lower case, padded to 77: the multimodal encoder was trained on padding, and reads it."""

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    default_padding = "max_length"
    default_clean_up = True

    def __init__(self, clean: str = "none", model_max_length: int = 77, **kwargs: Any):
        tokens = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
        super().__init__(clean=clean, model_max_length=model_max_length, **tokens | kwargs)

    @classmethod
    def from_vocabulary(cls, path: str | Path, **kwargs: Any) -> "HfvlmFLAVATokenizer":
        """From bert-base-uncased's `vocab.txt`, or a tokenizer.json of the same pieces."""
        engine = wordpiece(path)
        engine.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokens = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        engine.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
        return cls(tokenizer_object=engine, **kwargs)


class HfvlmFLAVAProcessor(DualEncoderProcessor):
    """Pictures and texts as FLAVA reads them: `processor(images=..., text=...)`, then `model(**inputs)`."""
