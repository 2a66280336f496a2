"""Vocabularies: byte-pair, WordPiece, sentencepiece and tiktoken files to `tokenizers`' engines, checked."""

import base64
import functools
import gzip
import io
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from hfvlm.checks.files import read_bytes, read_json, refusing
from hfvlm.checks.messages import cut, shown

# Of vocabularies, in bytes: a list of pieces, unpacked; a sentencepiece model, of which XLM-V's is the largest; and a
# tokenizer.json.
LARGEST_LIST, LARGEST_PIECES, LARGEST_TOKENIZER = 2**23, 2**25, 2**26
LONGEST_PIECE = 256
# Ways to make a piece of two others, for each piece; vocabularies have two or three.
MOST_SPLITS = 8


class VocabularyError(ValueError):
    """A file that is not the vocabulary it should be; the message names it."""

    def __init__(self, message: str = ""):
        super().__init__(cut(message))


Reader = TypeVar("Reader", bound=Callable[..., Any])


def _of_file(read: Reader) -> Reader:
    """Make a reader of vocabularies, `read(path, ...)`, refuse other files by name."""

    @functools.wraps(read)
    def refuse(path: str | Path, *args: Any, **kwargs: Any) -> Any:
        with refusing(Path(path), "not a vocabulary of this kind", VocabularyError, (ImportError,)):
            return read(path, *args, **kwargs)

    return refuse  # type: ignore[return-value]


@_of_file
def engine_from_json(path: str | Path) -> Tokenizer:
    """Read the engine that a tokenizer.json describes.

    Raises:
        FileNotFoundError: there is no such file.
        VocabularyError: the file describes none.
    """
    engine = Tokenizer.from_buffer(read_bytes(Path(path), LARGEST_TOKENIZER, VocabularyError))
    checked_ids(engine.get_vocab())
    return engine


def checked_ids(vocabulary: Any) -> dict[str, int]:
    """Return pieces by name, none of whose ids is far beyond their number: engines allocate up to the largest.

    Raises:
        ValueError: something else.
    """
    most = 2 * len(vocabulary) + 1000
    if not isinstance(vocabulary, dict) or not all(type(i) is int and 0 <= i < most for i in vocabulary.values()):
        raise ValueError("its pieces have no ids, or some far from each other")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError("some of its pieces share an id")
    return vocabulary


def checked_merges(merges: list[tuple[str, str]], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return merges whose pieces and results are in the vocabulary; an engine of others could not be stored.

    Raises:
        ValueError: one of them makes another.
    """
    for left, right in merges:
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ValueError(f"{shown(left)} and {shown(right)} are merged, and not all of it is in the vocabulary")
    return merges


def template(tokenizer: Tokenizer, before: str, after: str) -> processors.PostProcessor:
    """Make the step that puts special tokens around a text; an empty name leaves its side bare."""
    tokens = [token for token in (before, after) if token]
    pieces = [piece for piece in (before, "$A", after) if piece]
    return processors.TemplateProcessing(
        single=pieces, special_tokens=[(token, tokenizer.token_to_id(token)) for token in tokens]
    )


def add_placeholders(engine: Tokenizer, path: str | Path, size: int | None, *placeholders: str) -> None:
    """Add tokens that stand for media after the rows of an embedding table.

    Args:
        engine: to which they are added.
        path: its file, for the message.
        size: rows of the table; those beyond the vocabulary get names. None for as many as there are pieces.
        *placeholders: the tokens; a tokenizer.json may have them already.

    Raises:
        VocabularyError: there are more pieces than rows.
    """
    pieces = engine.get_vocab_size()
    known = pieces - sum(engine.token_to_id(token) is not None for token in placeholders)
    if size is not None and known > size:
        raise VocabularyError(
            f"{path}: its {known} pieces are more than the model's {size} (text_config.vocab_size): this is the "
            "vocabulary of another model."
        )
    names = (*(f"<unused_{i}>" for i in range(pieces, size or pieces)), *placeholders)
    engine.add_special_tokens([AddedToken(token, normalized=False) for token in names])


START, END = "<|startoftext|>", "<|endoftext|>"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
OPENAI_TOKENS = {"bos_token": START, "eos_token": END, "unk_token": END}


@_of_file
def openai_bpe(path: str | Path, *more: str) -> Tokenizer:
    """Read CLIP's byte-pair engine from OpenAI's `bpe_simple_vocab_16e6.txt.gz`, or from transformers' tokenizer.json.

    Args:
        path: the file.
        more: special pieces that come before the start token.

    Raises:
        VocabularyError: the file is neither, or a tokenizer.json without those pieces.
    """
    path = Path(path)
    if path.suffix == ".json":
        vocabulary, merges = _tokenizer_json(path)
    else:
        merges = _openai_merges(path)
        letters = byte_letters().values()
        words = (letter + "</w>" for letter in letters)
        pieces = [*letters, *words, *("".join(merge) for merge in merges), *more, START, END]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if missing := [piece for piece in more if piece not in vocabulary]:
        raise VocabularyError(f"{path}: this vocabulary has no {', '.join(missing)}; it is another model's.")
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=END))
    engine.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    pattern = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    split = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, BYTES])
    engine.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(Regex("</w>$"), ""), decoders.Replace("</w>", " ")]
    )
    engine.post_processor = template(engine, START, END)
    return engine


def _openai_merges(path: Path) -> list[tuple[str, str]]:
    packed = io.BytesIO(read_bytes(path, LARGEST_LIST, VocabularyError))
    with refusing(path, "not a gzipped list of merges", VocabularyError), gzip.GzipFile(fileobj=packed) as file:
        data = file.read(LARGEST_LIST + 1)
        if len(data) > LARGEST_LIST:
            raise ValueError(f"it unpacks to more than {LARGEST_LIST} bytes")
        text = data.decode("utf-8")
    # After a line of heading; the released file lists more merges than its vocabulary of 49,408 has room for.
    last = 49152 - 256 - 2 + 1
    merges = [line.split() for line in text.split("\n", last)[1:last] if line]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise VocabularyError(f"{path}: not a list of merges, two pieces a line.")
    return [(left, right) for left, right in merges]


def _tokenizer_json(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    with refusing(path, "not the tokenizer.json of a byte-pair encoding", VocabularyError):
        model = read_json(path, VocabularyError, LARGEST_TOKENIZER)["model"]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        vocabulary = checked_ids(model["vocab"])
        return vocabulary, checked_merges([(left, right) for left, right in pairs], vocabulary)


def _text(path: Path) -> str:
    """Read a text file, whatever ends its lines."""
    with io.TextIOWrapper(io.BytesIO(read_bytes(path, LARGEST_LIST, VocabularyError)), encoding="utf-8") as file:
        return file.read()


def byte_letters() -> dict[int, str]:
    """Return a printable letter for each byte, in the order of their ids; printable bytes are their own letters."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@_of_file
def wordpiece(path: str | Path) -> Tokenizer:
    """Read BERT's engine from a list of pieces (`vocab.txt`) or a tokenizer.json: it splits at spaces, punctuation and
    Chinese characters, changes no letters, and puts texts between [CLS] and [SEP].

    Raises:
        VocabularyError: the file is neither.
    """
    path = Path(path)
    if path.suffix == ".json":
        with refusing(path, "not the tokenizer.json of a BERT", VocabularyError):
            vocabulary = checked_ids(read_json(path, VocabularyError, LARGEST_TOKENIZER)["model"]["vocab"])
    else:
        pieces = _text(path).rstrip("\n").split("\n")
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
    missing = sorted(set(BERT_TOKENS) - set(vocabulary))
    if missing:
        raise VocabularyError(f"{path}: not BERT's vocabulary, it has no {', '.join(missing)}.")
    engine = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer(
        clean_text=False, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    engine.post_processor = template(engine, "[CLS]", "[SEP]")
    return engine


def uncased_wordpiece(path: str | Path, *more: str) -> Tokenizer:
    """Make bert-base-uncased's engine, which lowers letters and takes their accents off; see `wordpiece`.

    Args:
        path: the file.
        more: special tokens next to BERT's own.
    """
    engine = wordpiece(path)
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.add_special_tokens([AddedToken(token, normalized=False) for token in (*BERT_TOKENS, *more)])
    return engine


@_of_file
def sentencepiece(path: str | Path) -> Tokenizer:
    """Read the engine of a sentencepiece `.model`, unigram (T5's, mT5's) or BPE (Gemma's), or its tokenizer.json. The
    second piece, the end of a text, ends each.

    Raises:
        ImportError: sentencepiece or protobuf is not installed.
        VocabularyError: the file is not such a model.
    """
    engine = sentencepiece_engine(Path(path))
    engine.no_padding()
    engine.no_truncation()
    engine.post_processor = template(engine, "", str(engine.id_to_token(1)))
    return engine


@_of_file
def sentencepiece_engine(path: Path) -> Tokenizer:
    """Read the engine of a sentencepiece `.model`, or its tokenizer.json."""
    if path.suffix == ".json":
        return engine_from_json(path)
    proto = _pieces_of(path)
    engine = _unigram(proto) if proto.trainer_spec.model_type == UNIGRAM else _piece_pairs(proto)
    engine.add_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == USER_DEFINED])
    engine.add_special_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == CONTROL])
    return engine


# The first tokens of fairseq's vocabularies, and the last.
FAIRSEQ_TOKENS, MASK_TOKEN = ("<s>", "<pad>", "</s>", "<unk>"), "<mask>"


@_of_file
def fairseq_pieces(path: str | Path) -> Tokenizer:
    """Read XLM-R's engine from its `sentencepiece.bpe.model`, a unigram model with ids of fairseq's own, or from
    a tokenizer.json. Texts are between <s> and </s>.

    Raises:
        ImportError: sentencepiece or protobuf is not installed.
        VocabularyError: the file is not such a model.
    """
    path = Path(path)
    if path.suffix == ".json":
        engine = engine_from_json(path)
    else:
        proto = _pieces_of(path)
        # After sentencepiece's own <unk>, <s> and </s>.
        pieces = [*((token, 0.0) for token in FAIRSEQ_TOKENS), *((p.piece, p.score) for p in proto.pieces[3:])]
        engine = _unigram(proto, [*pieces, (MASK_TOKEN, 0.0)], FAIRSEQ_TOKENS.index("<unk>"))
    return between(engine, "<s>", "</s>")


@_of_file
def roberta_bpe(path: str | Path) -> Tokenizer:
    """Read RoBERTa's engine, GPT-2's with fairseq's tokens around texts; see `byte_pairs`."""
    return between(byte_pairs(path), "<s>", "</s>")


@_of_file
def nllb_pieces(path: str | Path, language: str = "eng_Latn") -> Tokenizer:
    """Read NLLB's engine from its tokenizer.json; texts are between the code of their language and </s>.

    Raises:
        VocabularyError: the file is no tokenizer.json of NLLB.
    """
    engine = engine_from_json(path)
    if engine.token_to_id(language) is None:
        raise VocabularyError(f"{path}: not the tokenizer.json of NLLB, it has no {shown(language)}.")
    return between(engine, language, "</s>")


def between(engine: Tokenizer, before: str, after: str) -> Tokenizer:
    """Put texts between two of fairseq's tokens, which are special wherever they stand in a text.

    Raises:
        VocabularyError: the engine lacks some of them.
    """
    tokens = (*FAIRSEQ_TOKENS, MASK_TOKEN)
    if missing := [token for token in tokens if engine.token_to_id(token) is None]:
        raise VocabularyError(f"Not a vocabulary of fairseq's, it has no {', '.join(missing)}.")
    engine.no_padding()
    engine.no_truncation()
    engine.add_special_tokens([AddedToken(t, normalized=False, lstrip=t == MASK_TOKEN) for t in tokens])
    engine.post_processor = template(engine, before, after)
    return engine


def _pieces_of(path: Path) -> Any:
    """Read and check a sentencepiece model."""
    from transformers.convert_slow_tokenizer import import_protobuf
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    from hfvlm.checkpoints.tensor_bundle import message

    if not (is_sentencepiece_available() and is_protobuf_available()):
        raise ImportError(f"{path}: reading a sentencepiece model needs `pip install 'hfvlm[convert]'`.")
    proto = import_protobuf().ModelProto()
    with refusing(path, "not a sentencepiece model", VocabularyError):
        data = read_bytes(path, LARGEST_PIECES, VocabularyError)
        # The parser makes an object of each piece, which a file can have every other byte.
        if len(message(data, MOST_PIECES).get(1, ())) * 4 > len(data):
            raise ValueError("a flood of empty pieces")
        proto.ParseFromString(data)
    _check_pieces(path, [piece.piece for piece in proto.pieces])
    return proto


def _check_pieces(path: Path, pieces: Sequence[str | bytes]) -> None:
    if not pieces or max(map(len, pieces)) > LONGEST_PIECE:
        raise VocabularyError(f"{path}: has no pieces, or some of more than {LONGEST_PIECE} letters.")


# Fields of a sentencepiece model: a piece each, and a few settings.
MOST_PIECES = 2**20
# Enumerations of sentencepiece_model.proto
UNIGRAM, CONTROL, USER_DEFINED = 1, 3, 4
# sentencepiece's letter for a space.
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def _unigram(proto: Any, pieces: list[tuple[str, float]] | None = None, unknown: int | None = None) -> Tokenizer:
    """Make T5's engine: words apart, each with the mark of a word's beginning; `pieces` and the id of the `unknown` in
    place of the model's own."""
    spec, own = proto.trainer_spec, [(piece.piece, piece.score) for piece in proto.pieces]
    unk_id = spec.unk_id if unknown is None else unknown
    engine = Tokenizer(models.Unigram(pieces or own, unk_id=unk_id, byte_fallback=spec.byte_fallback))
    if charsmap := proto.normalizer_spec.precompiled_charsmap:
        engine.normalizer = normalizers.Precompiled(charsmap)
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")]
    )
    engine.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    return engine


def _ways(ranks: Mapping[Any, int]) -> list[tuple[int, Any, Any]]:
    """Return the ways to make a piece of two others, as (rank, left, right), unless a vocabulary has fewer."""
    ways = (
        (rank, piece[:i], piece[i:])
        for piece, rank in ranks.items()
        for i in range(1, len(piece))
        if piece[:i] in ranks and piece[i:] in ranks
    )
    most = 1000 + MOST_SPLITS * len(ranks)
    found = list(islice(ways, most + 1))
    if len(found) > most:
        raise ValueError("its pieces can be made of others in too many ways")
    return found


def _piece_pairs(proto: Any) -> Tokenizer:
    """Make Gemma's engine: byte pairs over the whole text, a space is a letter, unknown letters are bytes."""
    ranks = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    ways = sorted(_ways(ranks), key=lambda way: (way[0], len(way[1]), len(way[2])))
    merges = [(left, right) for _, left, right in ways]
    spec = proto.trainer_spec
    engine = Tokenizer(
        models.BPE(ranks, merges, unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=spec.byte_fallback)
    )
    rules, steps = proto.normalizer_spec, []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps += [normalizers.Prepend(SPACE)]
    engine.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    engine.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return engine


@_of_file
def byte_pairs(path: str | Path) -> Tokenizer:
    """Read GPT-2's engine from its `vocab.json`, next to which lies `merges.txt`, or from a tokenizer.json.

    Raises:
        VocabularyError: the file is neither.
    """
    path = Path(path)
    vocabulary: Any
    if path.name.endswith("tokenizer.json"):
        vocabulary, merges = _tokenizer_json(path)
    else:
        merges_path = path.with_name(re.sub(r"vocab(.*)\.json$", r"merges\1.txt", path.name))
        with refusing(path, f"with {merges_path.name}, not the vocabulary and merges of GPT-2", VocabularyError):
            vocabulary = checked_ids(read_json(path, VocabularyError, LARGEST_LIST))
            lines = _text(merges_path).split("\n")
            pairs = (line.split(" ") for line in lines[1:] if line)
            merges = checked_merges([(left, right) for left, right in pairs], vocabulary)
    engine = Tokenizer(models.BPE(vocabulary, merges))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return engine


# Qwen's split of a text before byte pairs are joined: digits one by one.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@_of_file
def tiktoken_bpe(path: str | Path, words: str = WORDS) -> Tokenizer:
    """Read tiktoken's engine from its file of ranks: a piece in base64 and its id on each line.

    Raises:
        VocabularyError: the file is not such a list.
    """
    path = Path(path)
    with refusing(path, "not a list of ranks as tiktoken writes it", VocabularyError):
        lines = (line.split() for line in read_bytes(path, LARGEST_LIST, VocabularyError).splitlines() if line)
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in lines}
        checked_ids(ranks)
    _check_pieces(path, list(ranks))
    letters = byte_letters()
    names = {piece: piece.decode("latin-1").translate(letters) for piece in ranks}
    ways = sorted(_ways(ranks), key=lambda way: (way[0], ranks[way[1]], ranks[way[2]]))
    merges = [(names[left], names[right]) for _, left, right in ways]
    engine = Tokenizer(models.BPE({names[piece]: rank for piece, rank in ranks.items()}, merges, ignore_merges=True))
    engine.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(words), behavior="isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, BYTES])
    engine.decoder = decoders.ByteLevel()
    return engine


def cleans_up(engine: Tokenizer) -> bool:
    """Whether transformers 4, with which the originals decode, takes spaces before punctuation out: of GPT-NeoX's byte
    pairs it does, of LLaMA's pieces not."""
    return isinstance(engine.model, models.BPE) and not engine.model.byte_fallback
