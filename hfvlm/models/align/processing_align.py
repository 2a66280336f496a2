"""ALIGN's inputs (https://github.com/kakaobrain/coyo-align at 8cea82e, datasets/)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from hfvlm.media.images import to_8_bits
from hfvlm.media.resizing import centre, sampled, squash
from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.images import CroppedImageProcessor
from hfvlm.processing.tokenization import WordPieceTokenizer
from hfvlm.processing.vocabularies import wordpiece


class HfvlmALIGNImageProcessor(CroppedImageProcessor):
    """Images squashed to a square of 346 px, of which the centre of 289 px is cropped; values from -1 to 1.

    Args:
        resized: edge of that square.
        antialias: False interpolates between the four nearest pixels and keeps fractions, as TensorFlow and so the
            original did; True averages over all pixels that a new one covers, as transformers' processor does.
    """

    size = {"height": 289, "width": 289}
    resize_mode = "squash"
    resample = 2
    antialias = False
    resized = 346

    def pixels(self, image: Image.Image, settings: Mapping[str, Any], name: str) -> np.ndarray:
        if not settings["do_resize"]:
            return super().pixels(image, settings, name)
        edges = (settings["resized"], settings["resized"])
        image = to_8_bits(image, name).convert("RGB")
        if settings["antialias"]:
            whole = np.asarray(squash(image, edges, settings["resample"])).transpose(2, 0, 1).astype(np.float32)
        else:
            whole = sampled(image, edges)
        size = settings["size"]
        return self.scaled(centre(whole, (size["height"], size["width"])), settings)


class HfvlmALIGNTokenizer(WordPieceTokenizer):
    """BERT's word pieces, at most 64 with [CLS] and [SEP]; texts are first folded as TensorFlow Text does it.

    `from_vocabulary` reads BERT's `vocab.txt`, or transformers' tokenizer.json.
    """

    DEFAULTS = {**WordPieceTokenizer.DEFAULTS, "clean": "fold", "model_max_length": 64}
    engine_of = staticmethod(wordpiece)


class HfvlmALIGNProcessor(DualEncoderProcessor):
    """Images and texts to ALIGN's inputs: `processor(images=..., text=...)`, then `model(**inputs)`."""
