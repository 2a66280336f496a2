"""DALL-E mini's inputs (borisdayma/dalle-mini at f0be4de, kuprel/min-dalle at 73621fb)."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from hfvlm.models.dalle_mini.text_normalization import Words, ascii_words, normalized
from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.images import FixedSizeImageProcessor
from hfvlm.processing.settings import one_of
from hfvlm.processing.tokenization import HfvlmTokenizer
from hfvlm.processing.vocabularies import byte_pairs, template

# Ids below are those of the tokenizers that were trained for DALL-E mini.
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
# The space before a word, in the alphabet of byte pairs.
WORD_START = "\u0120"


class HfvlmDALLEMiniImageProcessor(FixedSizeImageProcessor):
    """Images as the dataset's codes were made of: short edge to 256 px, centre crop, pixels in 0..1."""

    size = {"height": 256, "width": 256}
    resize_mode = "shortest"
    resample = 1
    do_normalize = False


def bart_engine(path: str | Path) -> Tokenizer:
    """Read BART's engine, GPT-2's between <s> and </s>; see `byte_pairs`."""
    engine = byte_pairs(path)
    tokens = [token for token in (*SPECIAL.values(), "<mask>") if engine.token_to_id(token) is not None]
    engine.add_special_tokens([AddedToken(t, normalized=False, lstrip=t == "<mask>") for t in tokens])
    engine.post_processor = template(engine, SPECIAL["bos_token"], SPECIAL["eos_token"])
    return engine


def word_engine(engine: Tokenizer) -> Tokenizer:
    """Make min-dalle's engine of BART's: pieces of whole words, of characters; unknown ones are <unk>."""
    engine.model.unk_token = SPECIAL["unk_token"]
    engine.pre_tokenizer = pre_tokenizers.Metaspace(replacement=WORD_START, prepend_scheme="always", split=True)
    return engine


class HfvlmDALLEMiniTokenizer(HfvlmTokenizer):
    """BART's byte pairs, trained again, on cleaned texts of 64 tokens.

    `from_vocabulary` reads `vocab.json` with `merges.txt` beside it, or a tokenizer.json of the same pieces; with
    `clean="min-dalle"` as min-dalle does, which joins pieces in whole words.

    Args:
        clean: how texts are cleaned: "dalle-mini", "min-dalle" or "none".
        hashtag_file: words by frequency, by which "dalle-mini" splits hashtags (`enwiki-words-frequency.txt` of its
            repository); without it a hashtag is one word.
    """

    vocab_files_names = {**HfvlmTokenizer.vocab_files_names, "hashtag_file": "enwiki-words-frequency.txt"}
    DEFAULTS = {"clean": "dalle-mini", "model_max_length": 64, **SPECIAL}
    default_padding = "max_length"
    clean: Annotated[str, one_of("dalle-mini", "min-dalle", "none")]
    engine_of = staticmethod(bart_engine)
    # A number in 0..1 for each <person> in a text.
    draw: Callable[[], float] = staticmethod(random.random)

    def __init__(self, *args: Any, hashtag_file: str | Path | None = None, **kwargs: Any):
        self.hashtag_lines = (
            [] if hashtag_file is None else Path(hashtag_file).read_text(encoding="utf-8").splitlines()
        )
        self.words = Words(self.hashtag_lines) if self.hashtag_lines else str
        super().__init__(*args, **kwargs)

    @classmethod
    def from_vocabulary(cls, path: str | Path, **kwargs: Any) -> Any:
        engine = cls.engine_of(path)
        return cls(tokenizer_object=word_engine(engine) if kwargs.get("clean") == "min-dalle" else engine, **kwargs)

    def cleaned_text(self, text: str) -> str:
        if self.clean == "dalle-mini":
            return normalized(text, self.words, self.draw)
        return ascii_words(text) if self.clean == "min-dalle" else text

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Do as transformers', and write the words that hashtags are split by."""
        if self.hashtag_lines:
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            words = "\n".join([*self.hashtag_lines, ""])
            (folder / self.vocab_files_names["hashtag_file"]).write_text(words, encoding="utf-8")
        return super().save_pretrained(save_directory, *args, **kwargs)

    def min_dalle_rows(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of the text that min-dalle guides away from, and a text's: long ones are cut without </s>,
        and the former ends with the last id that is left."""
        length, pad = self.model_max_length, [self.pad_token_id]
        ids = self(text, padding=False, truncation=False)["input_ids"][:length]
        return [ids[0], ids[-1], *pad * (length - 2)], [*ids, *pad * (length - len(ids))]


class HfvlmDALLEMiniProcessor(DualEncoderProcessor):
    """Texts, and for training images, to DALL-E mini's inputs: `processor(text=...)`, then `model.draw(**inputs)`."""

    def to_images(self, pixels: Any) -> list[Any]:
        """Return what `model.draw` gives, `(B, 3, H, W)` in 0..1, as Pillow's images."""
        values = (pixels.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(value) for value in values]
