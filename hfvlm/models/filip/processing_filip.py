"""What FILIP is fed (https://github.com/Sense-GVT/DeCLIP at 5d99a85)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from hfvlm.media.resizing import cover
from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.images import FixedSizeImageProcessor
from hfvlm.processing.tokenization import ZeroPaddedTokenizer
from hfvlm.processing.vocabularies import END, START, openai_bpe

MASK = "<|mask|>"


class HfvlmFILIPImageProcessor(FixedSizeImageProcessor):
    """Pictures with a short edge of 256 px, bilinear, of which the centre of 224 px is cut out.

    Args:
        resized: the short edge.
    """

    SETTINGS = (*FixedSizeImageProcessor.SETTINGS, "resized")

    image_mean = [0.485, 0.456, 0.406]
    image_std = [0.229, 0.224, 0.225]
    resample = 2
    resized: int = 256

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super().checked(settings)
        if settings["resize_mode"] != "shortest":
            raise ValueError(f"resize_mode must be 'shortest', not {settings['resize_mode']!r}.")
        if settings["resized"] < max(settings["size"].values()):
            raise ValueError(f"resized must be an edge no shorter than size {settings['size']}.")
        return settings

    def resize(self, image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
        edge, size = settings["resized"], settings["size"]
        return cover(image, (edge, edge), settings["resample"], kept=(size["height"], size["width"]))


class HfvlmFILIPTokenizer(ZeroPaddedTokenizer):
    """OpenAI's byte-pair encoding with one more piece, `<|mask|>`, always padded to `model_max_length` with id 0.

    The reproduction compares padding as it compares words, so there is no attention mask, and `padding=True` means
    full length too. As in the paper, without padding: `model_input_names=["input_ids", "attention_mask"]`.
    """

    model_input_names = ["input_ids"]

    def __init__(self, clean: str = "lower", model_max_length: int = 77, **kwargs: Any):
        tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "mask_token": MASK}
        super().__init__(clean=clean, model_max_length=model_max_length, **tokens | kwargs)

    def __call__(self, text: Any = None, *args: Any, max_length: Any = None, **kwargs: Any) -> Any:
        """As every tokenizer; without `padding`, `truncation` and `max_length` the texts become what FILIP reads."""
        return super().__call__(text, *args, max_length=self.capped(max_length), **kwargs)

    @classmethod
    def from_vocabulary(cls, path: str | Path, **kwargs: Any) -> "HfvlmFILIPTokenizer":
        """From OpenAI's `bpe_simple_vocab_16e6.txt.gz`, or from a tokenizer.json."""
        return cls(tokenizer_object=openai_bpe(path, MASK), **kwargs)


class HfvlmFILIPProcessor(DualEncoderProcessor):
    """Pictures and texts as FILIP reads them: `processor(images=..., text=...)`, then `model(**inputs)`."""
