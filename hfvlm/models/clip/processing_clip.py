"""CLIP's inputs (https://github.com/openai/CLIP at d05afc4, clip/clip.py)."""

from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.images import CLIP_MEAN, CLIP_STD, FixedSizeImageProcessor
from hfvlm.processing.tokenization import HfvlmTokenizer
from hfvlm.processing.vocabularies import END, OPENAI_TOKENS, openai_bpe


class HfvlmCLIPImageProcessor(FixedSizeImageProcessor):
    """Images as CLIP was trained on them: short edge to 224 px, bicubic, centre crop."""

    image_mean = CLIP_MEAN
    image_std = CLIP_STD


class HfvlmCLIPTokenizer(HfvlmTokenizer):
    """OpenAI's byte-pair encoding, in lower case, 77 tokens with start and end.

    Padding is the end token; the model reads nothing after the first end token. `from_vocabulary` reads
    `bpe_simple_vocab_16e6.txt.gz`, as released with the weights, or transformers' tokenizer.json.
    """

    DEFAULTS = {"clean": "lower", "model_max_length": 77, **OPENAI_TOKENS, "pad_token": END}
    engine_of = staticmethod(openai_bpe)


class HfvlmCLIPProcessor(DualEncoderProcessor):
    """Images and texts to CLIP's inputs: `processor(images=..., text=...)`, then `model(**inputs)`."""
