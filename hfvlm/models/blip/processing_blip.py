"""What BLIP is fed (https://github.com/salesforce/BLIP at 056a169, data/utils.py and models/blip.py)."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import AddedToken, normalizers
from torch import Tensor
from transformers.image_processing_base import BatchFeature

from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.batches import listed
from hfvlm.processing.images import FixedSizeImageProcessor
from hfvlm.processing.settings import string
from hfvlm.processing.tokenization import HfvlmTokenizer
from hfvlm.processing.vocabularies import wordpiece


class HfvlmBLIPImageProcessor(FixedSizeImageProcessor):
    """Pictures as BLIP reads them: converted to RGB, then squashed to a square, bicubic."""

    resize_mode = "squash"
    size = {"height": 384, "width": 384}
    image_mean = [0.48145466, 0.4578275, 0.40821073]
    image_std = [0.26862954, 0.26130258, 0.27577711]

    def resize(self, image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
        return super().resize(image.convert("RGB"), settings)


class HfvlmBLIPTokenizer(HfvlmTokenizer):
    """BERT's word pieces in lower case, and [DEC], which begins what is written, and [ENC], which begins what is read
    together with a picture. Texts begin with [CLS]; the models put the others in its place.

    Args:
        max_words: words that are kept of a text, as its authors cut captions.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    default_clean_up = True
    MARKS: tuple[str, ...] = ("[DEC]", "[ENC]")

    def __init__(self, clean: str = "none", model_max_length: int = 35, max_words: int | None = None, **kwargs: Any):
        tokens = {"bos_token": "[DEC]", "eos_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
        tokens |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        extra = {"extra_special_tokens": list(self.MARKS[1:])}
        if max_words is not None:
            self.check_number("max_words", max_words, 1)
        self.max_words = max_words
        super().__init__(
            clean=clean, model_max_length=model_max_length, max_words=max_words, **tokens | extra | kwargs
        )

    @classmethod
    def from_vocabulary(cls, path: str | Path, **kwargs: Any) -> Any:
        """From bert-base-uncased's `vocab.txt`, or a tokenizer.json of the same pieces."""
        engine = wordpiece(path)
        engine.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokens = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *cls.MARKS)
        engine.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
        return cls(tokenizer_object=engine, **kwargs)

    def cleaned_text(self, text: str) -> str:
        text = super().cleaned_text(text)
        return " ".join(text.split(" ")[: self.max_words]) if self.max_words else text


class HfvlmBLIPProcessor(DualEncoderProcessor):
    """Pictures and texts as BLIP reads them: `processor(images=..., text=...)`, then `model(**inputs)`.

    Args:
        prompt: what captions begin with. Pictures alone come with it; `captions` puts it before the texts.
    """

    prompt: str

    CHECKS = {"prompt": string}

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, prompt: str = "", **kwargs: Any):
        self.set_arguments(prompt=prompt)
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> BatchFeature:
        """As `DualEncoderProcessor`; pictures alone come with the prompt, if there is one.

        Lists of two pictures, one list a text, become `pixel_values` `(B, 2, C, H, W)`.
        """
        images = listed(images)
        groups = [len(group) for group in images] if is_nested(images) else []
        if len(set(groups)) > 1:
            raise ValueError(f"Each text needs as many pictures as the others; there are {groups}.")
        flat = [image for group in images for image in group] if groups else images
        inputs = super().__call__(flat, text, *args, **kwargs)
        if groups:
            shape = inputs["pixel_values"].shape
            inputs["pixel_values"] = inputs["pixel_values"].reshape(len(groups), -1, *shape[1:])
        if text is None and self.prompt:
            prompts = [self.prompt] * len(inputs["pixel_values"])
            inputs.update(self.tokenizer(prompts, return_tensors=kwargs.get("return_tensors", "pt")))
        return inputs

    def captions(self, images: Any, text: Sequence[str]) -> BatchFeature:
        """Pictures and their captions -> what `HfvlmBLIPForConditionalGeneration` is trained on, `labels` included."""
        inputs = self(images, [self.prompt + caption for caption in text])
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        # Neither the first token nor the prompt is to be predicted; the last token of a prompt's ids is [SEP].
        labels[:, : len(self.tokenizer(self.prompt)["input_ids"]) - 1] = -100
        inputs["labels"] = labels
        return inputs

    def answers(self, text: Sequence[str]) -> Tensor:
        """Answers, as they are -> `(A, M)` ids with -100 after their end, for training and ranking."""
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.clean, tokenizer.max_words = "none", None
        encoded = tokenizer(list(text), return_tensors="pt")
        return encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)

    def decode_captions(self, ids: Any) -> list[str]:
        """Generated ids -> captions without their prompt, as the original spells them."""
        return [text[len(self.prompt) :] for text in self.batch_decode(ids, skip_special_tokens=True)]


def is_nested(images: Any) -> bool:
    """Lists of pictures in a list."""
    return isinstance(images, list | tuple) and bool(images) and all(isinstance(i, list | tuple) for i in images)
