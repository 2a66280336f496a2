"""The tokenizers of open_clip's other text towers (https://github.com/mlfoundations/open_clip at 89fb801,
src/open_clip/tokenizer.py, HFTokenizer)."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hfvlm.processing.tokenization import (
    FullLengthTokenizer,
    HfvlmTokenizer,
    WordPieceTokenizer,
    ZeroPaddedTokenizer,
)
from hfvlm.processing.vocabularies import (
    OPENAI_TOKENS,
    fairseq_pieces,
    nllb_pieces,
    openai_bpe,
    roberta_bpe,
    template,
    uncased_wordpiece,
)

FAIRSEQ = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "cls_token": "<s>",
    "sep_token": "</s>",
}


class HfvlmCLIPATokenizer(FullLengthTokenizer, WordPieceTokenizer):
    """bert-base-uncased's word pieces without [SEP], which is padding wherever it stands; always padded to
    `model_max_length`, whose last position the model pools.

    `from_vocabulary` reads `vocab.txt`, or a tokenizer.json.
    """

    model_input_names = ["input_ids"]
    DEFAULTS = WordPieceTokenizer.DEFAULTS | {"clean": "whitespace", "model_max_length": 32}
    # Rows of CLIPA's embedding that no piece has.
    spare_rows = 32000 - 30522

    @staticmethod
    def engine_of(path: str | Path) -> Tokenizer:
        engine = uncased_wordpiece(path)
        engine.post_processor = template(engine, "[CLS]", "[PAD]")
        return engine

    def cleaned_text(self, text: str) -> str:
        return super().cleaned_text(text).replace("[SEP]", "[PAD]")


class HfvlmCLIPPaddedTokenizer(ZeroPaddedTokenizer):
    """OpenAI's byte-pair encoding, always padded to `model_max_length` with id 0: MobileCLIP attends to padding.

    `from_vocabulary` reads `bpe_simple_vocab_16e6.txt.gz`, or transformers' tokenizer.json.
    """

    model_input_names = ["input_ids"]
    DEFAULTS = {"clean": "lower", "model_max_length": 77, **OPENAI_TOKENS}
    engine_of = staticmethod(openai_bpe)


class HfvlmCLIPRobertaTokenizer(HfvlmTokenizer):
    """RoBERTa's byte pairs. `from_vocabulary` reads `vocab.json`, next to which lies `merges.txt`, or a
    tokenizer.json."""

    DEFAULTS = FAIRSEQ | {"clean": "whitespace", "model_max_length": 77}
    engine_of = staticmethod(roberta_bpe)


class HfvlmCLIPXLMTokenizer(HfvlmTokenizer):
    """The pieces of XLM-R, or of XLM-V in MetaCLIP 2. `from_vocabulary` reads `sentencepiece.bpe.model`, or a
    tokenizer.json."""

    DEFAULTS = FAIRSEQ | {"clean": "whitespace", "model_max_length": 77}
    engine_of = staticmethod(fairseq_pieces)


class HfvlmCLIPNLLBTokenizer(HfvlmTokenizer):
    """NLLB's pieces after the code of the texts' language, in NLLB's own names; `from_vocabulary` reads a
    tokenizer.json.

    Args:
        language: the code; `set_language` changes it.
    """

    DEFAULTS = FAIRSEQ | {"clean": "whitespace", "model_max_length": 77}
    engine_of = staticmethod(nllb_pieces)
    # Rows of NLLB's embedding that no piece has.
    spare_rows = 2

    def __init__(self, *args: Any, language: str = "eng_Latn", **kwargs: Any):
        super().__init__(*args, language=language, **kwargs)
        self.set_language(language)

    def set_language(self, language: str) -> None:
        """Change the language of texts to come: "eng_Latn", "zho_Hans", ...

        Raises:
            ValueError: the vocabulary has no such code.
        """
        if self.backend_tokenizer.token_to_id(language) is None:
            raise ValueError(f"language {language!r} is none of this vocabulary; English is 'eng_Latn'.")
        self.language = language
        with self.lock:
            self.backend_tokenizer.post_processor = template(self.backend_tokenizer, language, "</s>")
