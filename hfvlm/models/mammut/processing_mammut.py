"""MaMMUT's inputs (https://github.com/LAION-AI/open_clip_mammut at ed2d1f6)."""

from hfvlm.models.clip.processing_clip import HfvlmCLIPImageProcessor
from hfvlm.models.coca.processing_coca import HfvlmCoCaProcessor, HfvlmCoCaTokenizer


class HfvlmMaMMUTImageProcessor(HfvlmCLIPImageProcessor):
    """Images as CLIP's: short edge to 224 px, bicubic, centre crop."""


class HfvlmMaMMUTTokenizer(HfvlmCoCaTokenizer):
    """CoCa's tokenizer, for texts of 77 tokens. Padding counts in a text's embedding, so it is never left out."""

    DEFAULTS = {**HfvlmCoCaTokenizer.DEFAULTS, "model_max_length": 77}


class HfvlmMaMMUTProcessor(HfvlmCoCaProcessor):
    """Images and texts to MaMMUT's inputs: `processor(images=..., text=...)`, then `model(**inputs)`."""
