"""FILIP's inputs (https://github.com/Sense-GVT/DeCLIP at 5d99a85)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer

from hfvlm.media.resizing import cover
from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.images import CroppedImageProcessor
from hfvlm.processing.tokenization import ZeroPaddedTokenizer
from hfvlm.processing.vocabularies import OPENAI_TOKENS, openai_bpe

MASK = "<|mask|>"


class HfvlmFILIPImageProcessor(CroppedImageProcessor):
    """Images with a short edge of 256 px, bilinear, of which the centre of 224 px is cropped.

    Args:
        resized: the short edge.
    """

    image_mean = [0.485, 0.456, 0.406]
    image_std = [0.229, 0.224, 0.225]
    resample = 2
    resized = 256

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super().checked(settings)
        if settings["resize_mode"] != "shortest":
            raise ValueError(f"resize_mode must be 'shortest', not {settings['resize_mode']!r}.")
        return settings

    def resize(self, image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
        edge, size = settings["resized"], settings["size"]
        return cover(image, (edge, edge), settings["resample"], crop=(size["height"], size["width"]))


class HfvlmFILIPTokenizer(ZeroPaddedTokenizer):
    """OpenAI's byte-pair encoding with one more piece, `<|mask|>`, always padded to `model_max_length` with id 0.

    The reproduction compares padding as it compares words, so there is no attention mask, and `padding=True` means
    full length too. As in the paper, without padding: `model_input_names=["input_ids", "attention_mask"]`.
    `from_vocabulary` reads OpenAI's `bpe_simple_vocab_16e6.txt.gz`, or a tokenizer.json.
    """

    model_input_names = ["input_ids"]
    DEFAULTS = {"clean": "lower", "model_max_length": 77, **OPENAI_TOKENS, "mask_token": MASK}

    @staticmethod
    def engine_of(path: str | Path) -> Tokenizer:
        return openai_bpe(path, MASK)


class HfvlmFILIPProcessor(DualEncoderProcessor):
    """Images and texts to FILIP's inputs: `processor(images=..., text=...)`, then `model(**inputs)`."""
