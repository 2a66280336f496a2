"""What ALIGN is fed (https://github.com/kakaobrain/coyo-align at 8cea82e, datasets/)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hfvlm.media.images import to_8_bits
from hfvlm.media.resizing import centre, sampled, squash
from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.images import FixedSizeImageProcessor
from hfvlm.processing.tokenization import HfvlmTokenizer
from hfvlm.processing.vocabularies import wordpiece


class HfvlmALIGNImageProcessor(FixedSizeImageProcessor):
    """Pictures squashed to a square of 346 px, whose centre of 289 px is cut out; values from -1 to 1.

    Args:
        resized: edge of that square.
        antialias: False reads four pixels for each that is made and keeps fractions, as TensorFlow and so the original
            did; True averages over all that one covers, as transformers' processor does.
    """

    SETTINGS = (*FixedSizeImageProcessor.SETTINGS, "resized")

    size = {"height": 289, "width": 289}
    resize_mode = "squash"
    resample = 2
    antialias = False
    resized: int = 346

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super().checked(settings)
        if settings["resized"] < max(settings["size"].values()):
            raise ValueError(f"resized must be an edge no shorter than size {settings['size']}.")
        return settings

    def pixels(self, image: Image.Image, settings: Mapping[str, Any], name: str) -> np.ndarray:
        if not settings["do_resize"]:
            return super().pixels(image, settings, name)
        edges = (settings["resized"], settings["resized"])
        picture = to_8_bits(image, name).convert("RGB")
        if settings["antialias"]:
            whole = np.asarray(squash(picture, edges, settings["resample"])).transpose(2, 0, 1).astype(np.float32)
        else:
            whole = sampled(picture, edges)
        size = settings["size"]
        return self.scaled(centre(whole, (size["height"], size["width"])), settings)


class HfvlmALIGNTokenizer(HfvlmTokenizer):
    """BERT's pieces of words, at most 64 with [CLS] and [SEP]; texts are first folded as TensorFlow Text does it."""

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    default_clean_up = True

    def __init__(self, clean: str = "fold", model_max_length: int = 64, **kwargs: Any):
        tokens = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
        super().__init__(clean=clean, model_max_length=model_max_length, **tokens | kwargs)

    @classmethod
    def from_vocabulary(cls, path: str | Path, **kwargs: Any) -> "HfvlmALIGNTokenizer":
        """From BERT's `vocab.txt`, or from transformers' tokenizer.json."""
        return cls(tokenizer_object=wordpiece(path), **kwargs)


class HfvlmALIGNProcessor(DualEncoderProcessor):
    """Pictures and texts as ALIGN reads them: `processor(images=..., text=...)`, then `model(**inputs)`."""
