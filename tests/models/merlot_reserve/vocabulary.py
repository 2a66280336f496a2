"""A vocabulary of words in the form of the authors' lowercase_encoder.json."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

SPECIAL = ("PAD", "START", "END", "MASK", "MASKAUDIO", "AUDIOSPAN", "LTOVPOOL", "unused0", "UNK", "RESETCTX")
WORDS = (
    *("answer", ":", "rationale", "10", "to", "50", "who", "is", "it", "the", "dog", "?", "a", "cat", "what", "does"),
    *("person", "1", "see", "nothing", "hears"),
)


def written_vocabulary(path: Path, size: int = 40) -> Path:
    """Special tokens first, then words, then as many others as make up the size."""
    pieces = [*(f"<|{name}|>" for name in SPECIAL), *WORDS]
    pieces += [f"word{i}" for i in range(size - len(pieces))]
    engine = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<|UNK|>"))
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.add_special_tokens([AddedToken(piece, normalized=False) for piece in pieces[: len(SPECIAL)]])
    engine.save(str(path))
    return path
