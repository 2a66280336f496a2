"""BLIP's inputs (https://github.com/salesforce/BLIP at 056a169, data/utils.py and models/blip.py)."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers.image_processing_base import BatchFeature

from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.batches import listed
from hfvlm.processing.images import CLIP_MEAN, CLIP_STD, FixedSizeImageProcessor
from hfvlm.processing.settings import string, whole
from hfvlm.processing.tokenization import WordPieceTokenizer
from hfvlm.processing.vocabularies import uncased_wordpiece


class HfvlmBLIPImageProcessor(FixedSizeImageProcessor):
    """Images as BLIP's: converted to RGB, then squashed to a square, bicubic."""

    resize_mode = "squash"
    size = {"height": 384, "width": 384}
    image_mean = CLIP_MEAN
    image_std = CLIP_STD

    def resize(self, image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
        return super().resize(image.convert("RGB"), settings)


class HfvlmBLIPTokenizer(WordPieceTokenizer):
    """BERT's word pieces in lower case, and [DEC], which begins generated texts, and [ENC], which begins texts that
    are encoded together with an image. Texts begin with [CLS]; the models put the others in its place.

    `from_vocabulary` reads bert-base-uncased's `vocab.txt`, or a tokenizer.json of the same pieces.

    Args:
        max_words: of a text, as its authors truncate captions.
    """

    MARKS: tuple[str, ...] = ("[DEC]", "[ENC]")
    DEFAULTS = {**WordPieceTokenizer.DEFAULTS, "model_max_length": 35, "bos_token": "[DEC]", "eos_token": "[SEP]"}

    max_words: Annotated[int | None, whole(1)]

    def __init__(
        self,
        clean: str | None = None,
        model_max_length: int | None = None,
        max_words: int | None = None,
        **kwargs: Any,
    ):
        self.max_words = max_words
        extra = {"extra_special_tokens": list(self.MARKS[1:])}
        super().__init__(clean, model_max_length, **{"max_words": max_words} | extra | kwargs)

    @classmethod
    def engine_of(cls, path: str | Path) -> Tokenizer:
        return uncased_wordpiece(path, *cls.MARKS)

    def cleaned_text(self, text: str) -> str:
        text = super().cleaned_text(text)
        return " ".join(text.split(" ")[: self.max_words]) if self.max_words else text


class HfvlmBLIPProcessor(DualEncoderProcessor):
    """Images and texts to BLIP's inputs: `processor(images=..., text=...)`, then `model(**inputs)`.

    Args:
        prompt: beginning of captions. Images without texts come with it; `captions` puts it before the texts.
    """

    prompt: Annotated[str, string]

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, prompt: str = "", **kwargs: Any):
        self.set_arguments(prompt=prompt)
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare inputs as `DualEncoderProcessor`; images without texts come with the prompt, if there is one.

        Lists of two images, one list a text, become `pixel_values` `(B, 2, C, H, W)`.
        """
        images = listed(images)
        groups = [len(group) for group in images] if is_nested(images) else []
        if len(set(groups)) > 1:
            raise ValueError(f"Each text needs as many images as the others; there are {groups}.")
        flat = [image for group in images for image in group] if groups else images
        inputs = super().__call__(flat, text, **kwargs)
        if groups:
            shape = inputs["pixel_values"].shape
            inputs["pixel_values"] = inputs["pixel_values"].reshape(len(groups), -1, *shape[1:])
        if text is None and self.prompt:
            prompts = [self.prompt] * len(inputs["pixel_values"])
            inputs.update(self.tokenizer(prompts, return_tensors=kwargs.get("return_tensors", "pt")))
        return inputs

    def captions(self, images: Any, text: Sequence[str]) -> BatchFeature:
        """Prepare images and their captions to train `HfvlmBLIPForConditionalGeneration`, `labels` included."""
        inputs = self(images, [self.prompt + caption for caption in text])
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        # Neither the first token nor the prompt is to be predicted; the last token of a prompt's ids is [SEP].
        labels[:, : len(self.tokenizer(self.prompt, padding=False)["input_ids"]) - 1] = -100
        inputs["labels"] = labels
        return inputs

    def answers(self, text: Sequence[str]) -> Tensor:
        """Encode answers, as they are -> `(A, M)` ids with -100 after their end, for training and ranking."""
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.clean, tokenizer.max_words = "none", None
        encoded = tokenizer(list(text), return_tensors="pt")
        return encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)

    def decode_captions(self, ids: Any) -> list[str]:
        """Decode generated ids -> captions without their prompt, spelled as the original does."""
        return [text[len(self.prompt) :] for text in self.batch_decode(ids, skip_special_tokens=True)]


def is_nested(images: Any) -> bool:
    """Whether images come as lists in a list."""
    return isinstance(images, list | tuple) and bool(images) and all(isinstance(i, list | tuple) for i in images)
