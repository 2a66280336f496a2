"""Wukong's inputs (huawei-noah/Pretrained-Language-Model at 0598f02, Noah_WuKong, main.py and data/tokenizer)."""

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from hfvlm.models.clip.processing_clip import HfvlmCLIPImageProcessor
from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.tokenization import WordPieceTokenizer
from hfvlm.processing.vocabularies import uncased_wordpiece

SPECIAL = re.compile(r"\[(UNK|CLS|SEP|PAD|MASK)\]")
# The blocks of Chinese characters, each of which is a word, and what the original splits at.
ENDS_WORDS = re.compile(
    r"[\s\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002ceaf"
    r"\U0002f800-\U0002fa1f]"
)
# Chinese characters that the engine takes for letters.
OVERLOOKED = re.compile(r"[\U0002b820-\U0002b91f]")


class HfvlmWukongImageProcessor(HfvlmCLIPImageProcessor):
    """Images as CLIP's: short edge to 224 px, bicubic, centre crop."""


class HfvlmWukongTokenizer(WordPieceTokenizer):
    """The Chinese BERT's word pieces, in lower case and without accents, each Chinese character a word: 32 tokens with
    [CLS] and [SEP].

    As in the original, [UNK], [CLS] and [SEP] are special in a text where they are words, and [PAD] and [MASK] never.
    `from_vocabulary` reads the `vocab.txt` of the release, or a tokenizer.json of the same pieces.
    """

    DEFAULTS = {**WordPieceTokenizer.DEFAULTS, "model_max_length": 32}
    default_padding = "max_length"
    engine_of: Callable[[str | Path], Tokenizer] = staticmethod(uncased_wordpiece)

    def cleaned_text(self, text: str) -> str:
        """Clean a text; special tokens that are none there get a space, at which the original splits them anyway."""
        text = super().cleaned_text(text).replace("\N{REPLACEMENT CHARACTER}", "")
        if not text.isprintable():
            text = "".join(letter for letter in text if not is_control(letter))
        return SPECIAL.sub(as_written, OVERLOOKED.sub(r" \g<0> ", text))


def is_control(letter: str) -> bool:
    """Whether the original drops a character: of controls, formats, surrogates, private use and unassigned ones."""
    return letter not in "\t\n\r" and unicodedata.category(letter).startswith("C")


def as_written(found: re.Match[str]) -> str:
    """Return a special token that is a word as it is, and the words that another is made of."""
    text, start, end = found.string, found.start(), found.end()
    sides = (text[start - 1 : start] or " ", text[end : end + 1] or " ")
    if found[1] not in ("PAD", "MASK") and all(map(ENDS_WORDS.match, sides)):
        return found[0]
    return f"[ {found[1]}]"


class HfvlmWukongProcessor(DualEncoderProcessor):
    """Images and texts to Wukong's inputs: `processor(images=..., text=...)`, then `model(**inputs)`."""
