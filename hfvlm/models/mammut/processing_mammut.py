"""What MaMMUT is fed (https://github.com/LAION-AI/open_clip_mammut at ed2d1f6)."""

from typing import Any

from hfvlm.models.clip.processing_clip import HfvlmCLIPImageProcessor
from hfvlm.models.coca.processing_coca import HfvlmCoCaProcessor, HfvlmCoCaTokenizer


class HfvlmMaMMUTImageProcessor(HfvlmCLIPImageProcessor):
    """Pictures as CLIP reads them: short edge to 224 px, bicubic, centre crop."""


class HfvlmMaMMUTTokenizer(HfvlmCoCaTokenizer):
    """As CoCa's, for texts of 77 tokens. Padding counts in a text's embedding, so it is never left out."""

    def __init__(self, clean: str = "lower", model_max_length: int = 77, **kwargs: Any):
        super().__init__(clean=clean, model_max_length=model_max_length, **kwargs)


class HfvlmMaMMUTProcessor(HfvlmCoCaProcessor):
    """Pictures and texts as MaMMUT reads them: `processor(images=..., text=...)`, then `model(**inputs)`."""
