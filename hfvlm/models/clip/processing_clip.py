"""What CLIP is fed (https://github.com/openai/CLIP at d05afc4, clip/clip.py)."""

from pathlib import Path
from typing import Any

from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.images import FixedSizeImageProcessor
from hfvlm.processing.tokenization import HfvlmTokenizer
from hfvlm.processing.vocabularies import END, START, openai_bpe


class HfvlmCLIPImageProcessor(FixedSizeImageProcessor):
    """Pictures as CLIP was trained on them: short edge to 224 px, bicubic, centre crop."""

    image_mean = [0.48145466, 0.4578275, 0.40821073]
    image_std = [0.26862954, 0.26130258, 0.27577711]


class HfvlmCLIPTokenizer(HfvlmTokenizer):
    """OpenAI's byte-pair encoding, in lower case, 77 tokens with start and end.

    Padding is the end token; whatever follows the first end token is never read.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, clean: str = "lower", model_max_length: int = 77, **kwargs: Any):
        tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        super().__init__(clean=clean, model_max_length=model_max_length, **tokens | kwargs)

    @classmethod
    def from_vocabulary(cls, path: str | Path, **kwargs: Any) -> "HfvlmCLIPTokenizer":
        """From `bpe_simple_vocab_16e6.txt.gz`, as released with the weights, or from transformers' tokenizer.json."""
        return cls(tokenizer_object=openai_bpe(path), **kwargs)


class HfvlmCLIPProcessor(DualEncoderProcessor):
    """Pictures and texts as CLIP reads them: `processor(images=..., text=...)`, then `model(**inputs)`."""
