"""Tokenizers: the text cleaning, padding and truncation that a model was trained with, on `tokenizers`' engines."""

import base64
import functools
import gzip
import html
import inspect
import io
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar
from unicodedata import category, normalize

import ftfy
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import logging

from hfvlm.checks.files import read_bytes, read_json, refusing
from hfvlm.checks.messages import cut, shown
from hfvlm.processing.batches import texts_of
from hfvlm.processing.protection import PROTECTED, unprotected
from hfvlm.processing.publishing import Published
from hfvlm.processing.settings import LOADING, STORED, check_keywords, flag, shared, whole

logger = logging.get_logger(__name__)

# Of vocabularies, in bytes: a list of pieces, unpacked; and a tokenizer.json.
LARGEST_LIST, LARGEST_TOKENIZER = 2**23, 2**26
LONGEST_PIECE = 256
# How many ways there are to make a piece of two others, for each piece; vocabularies have two or three.
MOST_SPLITS = 8


def fixed(text: str) -> str:
    """Broken encodings, curly quotes and HTML entities repaired, as every original of the CLIP family does."""
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def clean_lower(text: str) -> str:
    """OpenAI's cleaning: repair, one space between words, lower case."""
    return " ".join(fixed(text).split()).lower()


def clean_repaired(text: str) -> str:
    """transformers' CLIP tokenizer with ftfy: as OpenAI's, but HTML entities stay wherever ftfy leaves them."""
    return " ".join(ftfy.fix_text(text).split()).lower()


def clean_canonical(text: str) -> str:
    """open_clip's cleaning for SigLIP: repair, no punctuation, lower case, one space between words."""
    text = fixed(text).replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return " ".join(text.lower().split())


def clean_case(text: str) -> str:
    """big_vision's cleaning: lower case alone."""
    return text.lower()


def clean_caption(text: str) -> str:
    """BLIP's cleaning of captions: lower case, a space for most punctuation, one space between words."""
    return re.sub(r"\s{2,}", " ", PUNCTUATION.sub(" ", text.lower())).rstrip("\n").strip(" ")


def clean_question(text: str) -> str:
    """BLIP's cleaning of questions: lower case, without most punctuation."""
    return PUNCTUATION.sub("", text.lower()).rstrip(" ")


# The question mark, the comma and the apostrophe stay.
PUNCTUATION = re.compile(r"[.!\"()*#:;~]")


# Of Unicode's characters of the kind Default_Ignorable_Code_Point, those that occur.
IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def clean_fold(text: str) -> str:
    """TensorFlow Text's cleaning for BERT: letters that look alike become one, in lower case without accents; what is
    not seen goes; control characters become spaces."""
    text = IGNORABLE.sub("", normalize("NFD", text))
    text = normalize("NFKC", normalize("NFKC", text.casefold()).casefold())
    letters = (letter for letter in normalize("NFD", IGNORABLE.sub("", text)) if category(letter) != "Mn")
    return "".join(" " if category(letter) in ("Cc", "Cf") else letter for letter in letters)


CLEANINGS: dict[str, Callable[[str], str]] = {
    "lower": clean_lower,
    "repaired": clean_repaired,
    "canonical": clean_canonical,
    "case": clean_case,
    "caption": clean_caption,
    "question": clean_question,
    "fold": clean_fold,
    "none": str,
}


# Keywords of a tokenizer's call.
TOKENIZER_ARGUMENTS = frozenset(inspect.signature(PreTrainedTokenizerBase.__call__).parameters) - {
    "self",
    "kwargs",
} | {
    "max_target_length",
    "sanitize_control_tokens",
    "split_special_tokens",
}
PADDINGS = (True, False, "longest", "max_length", "do_not_pad")
# Keywords of a tokenizer's constructor, and what tokenizer_config.json holds.
TOKENIZER_SETTINGS = frozenset(
    {
        *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
        "_json_padding",
        "_json_truncation",
        "_spm_precompiled_charsmap",
        "add_bos_token",
        "add_eos_token",
        "add_prefix_space",
        "added_tokens_decoder",
        "added_tokens_file",
        "additional_special_tokens",
        "chat_control_tokens",
        "chat_template",
        "clean",
        "clean_up_tokenization_spaces",
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
        "extra_special_tokens",
        "files_loaded",
        "fix_mistral_regex",
        "gguf_file",
        "legacy",
        "max_len",
        "max_length",
        "merges",
        "merges_file",
        "model_input_names",
        "model_max_length",
        "model_specific_special_tokens",
        "pad_to_multiple_of",
        "pad_token_type_id",
        "padding_side",
        "post_processor",
        "response_schema",
        "response_template",
        "special_tokens_map_file",
        "split_special_tokens",
        "stride",
        "tokenizer_class",
        "tokenizer_config_file",
        "tokenizer_file",
        "tokenizer_object",
        "tokenizer_padding",
        "tokenizer_truncation",
        "truncation_side",
        "truncation_strategy",
        "verbose",
        "vocab",
        "vocab_file",
    }
)
# Numbers of a call, by their least value.
LEAST = {"max_length": 1, "max_target_length": 1, "pad_to_multiple_of": 1, "stride": 0}
SIDES = ("left", "right")


class EngineLock:
    """A lock of an engine, whose padding and truncation are set for each call. A copy or a pickle has its own."""

    def __init__(self) -> None:
        self.lock = RLock()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self.lock.release()

    def __reduce__(self) -> Any:
        return EngineLock, ()


class HfvlmTokenizer(Published, TokenizersBackend):
    """Cleans texts, and pads and truncates as the model was trained unless told otherwise.

    One tokenizer may be called by several threads at once. Special tokens that `hfvlm.processing.protection`
    has marked in a text are encoded as the words they are.

    Args:
        clean: how texts are cleaned first: "lower" as OpenAI's CLIP, "repaired" as LanguageBind, "canonical" as
            open_clip's SigLIP, "case" as big_vision, "caption" and "question" as BLIP, "fold" as TensorFlow Text, or
            "none".
        model_max_length: tokens of the longest text, special tokens included.
        clean_up_tokenization_spaces: take spaces before punctuation out of decoded texts, as the originals' tokenizers
            of word pieces do.

    Raises:
        TypeError: an unknown argument.
        ValueError: a value that an argument cannot have.
    """

    default_padding: bool | str = True
    # Whether decoded texts are cleaned up where nothing else is said.
    default_clean_up: bool = False
    # Sides that texts may be padded on: the model cannot read others.
    padding_sides: tuple[str, ...] = SIDES

    def __init__(self, *args: Any, clean: str = "none", **kwargs: Any):
        self.check_settings(kwargs)
        if clean not in CLEANINGS:
            raise ValueError(f"clean must be one of {', '.join(CLEANINGS)}, not {clean!r}.")
        self.clean = clean
        self.lock = EngineLock()
        kwargs = {name: value for name, value in kwargs.items() if name not in shared() - self.known_settings()}
        super().__init__(*args, clean=clean, **{"clean_up_tokenization_spaces": self.default_clean_up} | kwargs)

    @classmethod
    def known_settings(cls) -> frozenset[str]:
        """Keywords of the constructor."""
        own = {name for base in cls.__mro__ if issubclass(base, HfvlmTokenizer) for name in _parameters(base.__init__)}
        return frozenset({*TOKENIZER_SETTINGS, *STORED, *LOADING, *own})

    def check_settings(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse arguments of the constructor that are unknown, or have a value that they cannot have.

        Raises:
            TypeError: an unknown argument, naming the nearest one.
            ValueError: naming the argument and what it must be.
        """
        tokens = {name for name, value in kwargs.items() if name.endswith("_token") and isinstance(value, TOKEN)}
        check_keywords(self, kwargs, self.known_settings() - LOADING - STORED, {*LOADING, *STORED, *tokens, *shared()})
        longest = kwargs.get("model_max_length")
        if longest is not None:
            self.check_number("model_max_length", longest, 1, 10**31)
        if (side := kwargs.get("truncation_side")) is not None and side not in SIDES:
            raise ValueError(f"{type(self).__name__}: truncation_side must be 'left' or 'right', not {side!r}.")
        for name in ("clean_up_tokenization_spaces", "split_special_tokens"):
            if kwargs.get(name) is not None:
                self.check_value(name, kwargs[name], flag)

    def check_value(self, name: str, value: Any, check: Callable[[Any], Any]) -> None:
        """Refuse a value.

        Raises:
            ValueError: naming the argument and what it must be.
        """
        try:
            check(value)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {name} {error}, not {value!r:.200}.") from error

    def check_number(self, name: str, value: Any, least: int, most: int = 2**31 - 1) -> None:
        """Refuse what is no integer of a range; see `check_value`."""
        self.check_value(name, value, whole(least, most))

    def capped(self, max_length: int | None) -> int:
        """A length no longer than the model's."""
        if max_length is not None:
            self.check_number("max_length", max_length, 1)
        return min(max_length or self.model_max_length, self.model_max_length)

    def check_side(self, side: Any) -> None:
        """Refuse a side that texts cannot be padded on.

        Raises:
            ValueError: naming the sides that they can be padded on.
        """
        if side is not None and side not in self.padding_sides:
            raise ValueError(
                f"{type(self).__name__}: padding_side must be {' or '.join(map(repr, self.padding_sides))}, not "
                f"{side!r}: the model was trained on texts padded there, and embeds others differently."
            )

    def check_call(self, options: Mapping[str, Any]) -> None:
        """Refuse keywords of a call that are unknown, or have a value that they cannot have.

        Raises:
            TypeError: an unknown keyword, naming the nearest one.
            ValueError: naming the keyword and what it must be.
        """
        check_keywords(self, options, TOKENIZER_ARGUMENTS)
        nested = options.get("tokenizer_kwargs") or {}
        check_keywords(f"{type(self).__name__}, tokenizer_kwargs", nested, TOKENIZER_ARGUMENTS)
        for given in (options, nested):
            for name, least in LEAST.items():
                if given.get(name) is not None:
                    self.check_number(name, given[name], least)
            self.check_side(given.get("padding_side"))

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "padding_side":
            self.check_side(value)
        super().__setattr__(key, value)

    @classmethod
    def convert_to_native_format(cls, *_: Any, **kwargs: Any) -> dict[str, Any]:
        """Take tokenizer.json as it is; transformers would rebuild the engine of a class that has an `__init__` from
        the vocabulary alone, and lose the rest."""
        return kwargs

    # From texts to ids

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        *args: Any,
        padding: Any = None,
        truncation: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As every tokenizer; without `padding` and `truncation` the texts become what the model was trained on.

        Texts may come as a list, a tuple, a generator, an array of strings, a Series or a column.

        Raises:
            TypeError: an unknown keyword, or what is no text.
            ValueError: a value that a keyword cannot have, no texts, or a missing one.
        """
        self.check_call(kwargs)
        # Whether marks are to be heeded is written in the texts.
        kwargs.pop("sanitize_control_tokens", None)
        options = kwargs | {
            "padding": self.default_padding if padding is None else padding,
            "truncation": True if truncation is None else truncation,
        }
        words = bool(kwargs.get("is_split_into_words"))
        text = self.prepared(text, words=words)
        text_pair = self.prepared(text_pair, "text_pair", words=words)
        text_target = self.prepared(text_target, "text_target", words=words)
        if any(map(is_marked, (text, text_pair, text_target))):
            if text_pair is not None or text_target is not None or words or args:
                raise ValueError(f"{type(self).__name__} reads protected texts one by one, without pairs or targets.")
            return self.encode_marked(text, **options)
        with self.lock:
            encoded = super().__call__(text, text_pair, text_target, *args, **options)
        self.warn_of_cuts(text, encoded, kwargs)
        return encoded

    def encode(self, text: Any, text_pair: Any = None, **kwargs: Any) -> list[int]:
        """As every tokenizer: the ids of one text, neither padded nor cut unless asked for.

        Raises:
            TypeError: an unknown keyword, or what is no text.
        """
        self.check_call(kwargs)
        kwargs.pop("sanitize_control_tokens", None)
        words = bool(kwargs.get("is_split_into_words"))
        text, text_pair = self.prepared(text, words=words), self.prepared(text_pair, "text_pair", words=words)
        if is_marked(text) and text_pair is None and not words:
            return self.encode_marked(text, **{"padding": False, "truncation": False} | kwargs)["input_ids"]
        with self.lock:
            return super().encode(text, text_pair, **kwargs)

    def tokenize(self, text: Any, pair: Any = None, *args: Any, **kwargs: Any) -> list[str]:
        """As every tokenizer: the tokens of one text."""
        self.check_call(kwargs)
        text, pair = self.prepared(text), self.prepared(pair, "pair")
        if is_marked(text):
            return [str(token) for token in self.convert_ids_to_tokens(self.marked_ids(text))]
        with self.lock:
            return super().tokenize(text, pair, *args, **kwargs)

    def pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> BatchEncoding:
        """As every tokenizer.

        Raises:
            ValueError: a side that the model cannot read.
        """
        self.check_side(kwargs.get("padding_side"))
        return super().pad(encoded_inputs, *args, **kwargs)

    def prepared(self, text: Any, name: str = "text", *, words: bool = False) -> Any:
        """A text or a list of texts, cleaned; words that are split already as they are."""
        if text is None:
            return None
        text = texts_of(text, name)
        return text if words else self.cleaned(text)

    def cleaned(self, text: Any) -> Any:
        """A text, or the texts of a list, as the model was trained on them."""
        if isinstance(text, str):
            return self.cleaned_text(text)
        return [self.cleaned_text(item) if isinstance(item, str) else item for item in text]

    def cleaned_text(self, text: str) -> str:
        """One text, cleaned."""
        return CLEANINGS[self.clean](text)

    def warn_of_cuts(self, text: Any, encoded: BatchEncoding, options: Mapping[str, Any]) -> None:
        """Name the texts that lost their end."""
        if options.get("return_overflowing_tokens") or not isinstance(encoded, BatchEncoding):
            return
        batch = [text] if isinstance(text, str) else text
        encodings: Any = encoded.encodings or ()
        cut = [i for i, encoding in enumerate(encodings) if encoding.overflowing]
        if cut and batch is not None:
            first, others = cut[0], f" {len(cut) - 1} more were cut, too." if len(cut) > 1 else ""
            tokens = len(encodings[first].ids)
            logger.warning(
                f"Text {first} is too long and was cut to {tokens} tokens: {str(batch[first])[:60]!r}...{others}"
            )

    # Texts with marks in them

    def encode_marked(
        self,
        text: Any,
        *,
        padding: Any,
        truncation: Any,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        **options: Any,
    ) -> BatchEncoding:
        """Texts, in some of which special tokens are marked as words."""
        several = not isinstance(text, str)
        before, after = self.around() if add_special_tokens else ([], [])
        room = max_length or (self.model_max_length if truncation else None)
        rows = []
        for item in text if several else [text]:
            ids = self.marked_ids(item)
            if truncation and truncation != "do_not_truncate" and room is not None:
                kept = max(room - len(before) - len(after), 0)
                ids = ids[:kept] if self.truncation_side == "right" else ids[len(ids) - min(kept, len(ids)) :]
            rows.append([*before, *ids, *after])
        known = ("pad_to_multiple_of", "padding_side", "return_attention_mask", "return_tensors")
        given = {name: options[name] for name in known if options.get(name) is not None}
        one = not several and not given.get("return_tensors")
        length = room if padding == "max_length" else None
        return self.pad({"input_ids": rows[0] if one else rows}, padding=padding, max_length=length, **given)

    def marked_ids(self, text: str) -> list[int]:
        """Ids of a text without those around it: its tokens are tokens, but for those that are marked."""
        added = self.added_tokens_encoder
        pattern = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
        ids: list[int] = []
        for i, piece in enumerate(re.split(f"({pattern})", text) if added else [text]):
            ids += [added[piece]] if i % 2 else self.plain_ids(unprotected(piece), first=i == 0)
        return ids

    def plain_ids(self, text: str, *, first: bool = True) -> list[int]:
        """Ids of a text in which nothing is a token of its own; not the `first` piece, it follows on one."""
        if not text:
            return []
        if first or not self.begins_differently():
            return self._model_ids(text)
        start = self._model_ids("\n")
        ids = self._model_ids("\n" + text)
        return ids[len(start) :] if ids[: len(start)] == start else self._model_ids(text)

    def _model_ids(self, text: str) -> list[int]:
        engine = self.backend_tokenizer
        text = engine.normalizer.normalize_str(text) if engine.normalizer is not None else text
        before = engine.pre_tokenizer
        pieces = [text] if before is None else [piece for piece, _ in before.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in engine.model.tokenize(piece)]

    def begins_differently(self) -> bool:
        """Whether the beginning of a text is encoded otherwise than what follows a token."""
        token = next(iter(self.added_tokens_encoder), None)
        if token is None:
            return False
        with self.lock:
            ids = super().__call__(token + "a", add_special_tokens=False, padding=False, truncation=False)["input_ids"]
        return ids[1:] != self._model_ids("a")

    def around(self) -> tuple[list[int], list[int]]:
        """Ids before and after every text."""
        with self.lock:
            whole = super().__call__("a", padding=False, truncation=False)["input_ids"]
            inner = super().__call__("a", add_special_tokens=False, padding=False, truncation=False)["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
        return whole[:start], whole[start + len(inner) :]

    # From ids to texts

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,  # noqa: FBT001, FBT002 (transformers' own)
        clean_up_tokenization_spaces: bool | None = None,  # noqa: FBT001
        **kwargs: Any,
    ) -> Any:
        """As every tokenizer: ids to a text, or rows of ids to texts.

        Raises:
            TypeError: an unknown keyword.
        """
        check_keywords(self, kwargs, {"spaces_between_special_tokens", "use_source_tokenizer"})
        ids = self.decodable(token_ids, skip=skip_special_tokens)
        # transformers refuses to clean up what byte pairs make, which some originals do.
        text: Any = super().decode(ids, skip_special_tokens, clean_up_tokenization_spaces=False)
        clean = clean_up_tokenization_spaces
        if not (self.clean_up_tokenization_spaces if clean is None else clean):
            return text
        return (
            self.clean_up_tokenization(text) if isinstance(text, str) else list(map(self.clean_up_tokenization, text))
        )

    def decodable(self, token_ids: Any, *, skip: bool) -> Any:
        """Ids as they are decoded; with `skip`, special tokens are to be left out."""
        return token_ids

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Do nothing: hfvlm is installed code, and copying a module of it beside the weights could not import."""


class VocabularyError(ValueError):
    """A file that is not the vocabulary it should be; the message names it."""

    def __init__(self, message: str = ""):
        super().__init__(cut(message))


Reader = TypeVar("Reader", bound=Callable[..., Any])


def _of_file(read: Reader) -> Reader:
    """A reader of vocabularies, which refuses by name whatever is none: `read(path, ...)`."""

    @functools.wraps(read)
    def refuse(path: str | Path, *args: Any, **kwargs: Any) -> Any:
        with refusing(Path(path), "not a vocabulary of this kind", VocabularyError, (ImportError,)):
            return read(path, *args, **kwargs)

    return refuse  # type: ignore[return-value]


@_of_file
def engine_from_json(path: str | Path) -> Tokenizer:
    """The engine that a tokenizer.json describes.

    Raises:
        FileNotFoundError: there is no such file.
        VocabularyError: the file describes none.
    """
    engine = Tokenizer.from_buffer(read_bytes(Path(path), LARGEST_TOKENIZER, VocabularyError))
    checked_ids(engine.get_vocab())
    return engine


def checked_ids(vocabulary: Any) -> dict[str, int]:
    """Pieces by name, whose ids are about as many as they: engines make room up to the largest.

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
    """Merges of pieces that the vocabulary has, into one that it has; an engine without could not be stored.

    Raises:
        ValueError: one of them makes another.
    """
    for left, right in merges:
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ValueError(f"{shown(left)} and {shown(right)} are merged, and not all of it is in the vocabulary")
    return merges


TOKEN = (str, AddedToken)


def _parameters(function: Any) -> Iterable[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]


def is_marked(text: Any) -> bool:
    """Whether special tokens are marked in a text, or in one of several."""
    texts = text if isinstance(text, list) else [text]
    return any(isinstance(item, str) and PROTECTED in item for item in texts)


class ZeroPaddedTokenizer(HfvlmTokenizer):
    """Always pads to `model_max_length`, on the right, with id 0: the model was trained on texts of that length, and
    `padding=True` means it too.

    Id 0 is that of "!" within a word. It is no special token of the engine, which would be cut out of texts.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    default_padding = "max_length"
    padding_sides = ("right",)
    pad_token_id = 0

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.pop("pad_token", None)
        super().__init__(*args, **kwargs)

    @property
    def pad_token(self) -> str:
        """The piece of id 0."""
        return str(self.convert_ids_to_tokens(self.pad_token_id))

    def __call__(self, text: Any = None, *args: Any, padding: Any = None, **kwargs: Any) -> Any:
        """As every tokenizer; without `padding` and `truncation` the texts become what the model was trained on."""
        return super().__call__(text, *args, padding="max_length" if padding is True else padding, **kwargs)


def template(tokenizer: Tokenizer, before: str, after: str) -> processors.PostProcessor:
    """Special tokens around a text; an empty name leaves its side bare."""
    tokens = [token for token in (before, after) if token]
    pieces = [piece for piece in (before, "$A", after) if piece]
    return processors.TemplateProcessing(
        single=pieces, special_tokens=[(token, tokenizer.token_to_id(token)) for token in tokens]
    )


START, END = "<|startoftext|>", "<|endoftext|>"


@_of_file
def openai_bpe(path: str | Path, *more: str) -> Tokenizer:
    """CLIP's byte-pair engine from OpenAI's `bpe_simple_vocab_16e6.txt.gz`, or from transformers' tokenizer.json.

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
        letters = _byte_letters().values()
        words = (letter + "</w>" for letter in letters)
        pieces = [*letters, *words, *("".join(merge) for merge in merges), *more, START, END]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if missing := [piece for piece in more if piece not in vocabulary]:
        raise VocabularyError(f"{path}: this vocabulary has no {', '.join(missing)}; it is another model's.")
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=END))
    engine.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    pattern = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
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
    """A text file, whatever ends its lines."""
    with io.TextIOWrapper(io.BytesIO(read_bytes(path, LARGEST_LIST, VocabularyError)), encoding="utf-8") as file:
        return file.read()


def _byte_letters() -> dict[int, str]:
    """A printable letter for each byte, in the order of their ids: printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@_of_file
def wordpiece(path: str | Path) -> Tokenizer:
    """BERT's engine, from a list of pieces (`vocab.txt`) or a tokenizer.json: splits at spaces, punctuation and
    Chinese characters, and changes no letters; texts come out between [CLS] and [SEP].

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
    missing = sorted({"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} - set(vocabulary))
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


@_of_file
def sentencepiece(path: str | Path) -> Tokenizer:
    """The engine behind a sentencepiece `.model`, unigram (T5's, mT5's) or BPE (Gemma's), or its tokenizer.json. The
    second piece, the end of a text, closes each.

    Raises:
        ImportError: sentencepiece or protobuf is not installed.
        VocabularyError: the file is not such a model.
    """
    path = Path(path)
    engine = engine_from_json(path) if path.suffix == ".json" else _from_sentencepiece(path)
    engine.no_padding()
    engine.no_truncation()
    engine.post_processor = template(engine, "", str(engine.id_to_token(1)))
    return engine


@_of_file
def _from_sentencepiece(path: Path) -> Tokenizer:
    from transformers.convert_slow_tokenizer import import_protobuf
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    from hfvlm.checkpoints.tensor_bundle import message

    if not (is_sentencepiece_available() and is_protobuf_available()):
        raise ImportError(f"{path}: reading a sentencepiece model needs `pip install 'hfvlm[convert]'`.")
    proto = import_protobuf().ModelProto()
    with refusing(path, "not a sentencepiece model", VocabularyError):
        data = read_bytes(path, LARGEST_LIST, VocabularyError)
        # The parser makes an object of each piece, which a file can have every other byte.
        if len(message(data, MOST_PIECES).get(1, ())) * 4 > len(data):
            raise ValueError("a flood of empty pieces")
        proto.ParseFromString(data)
    _check_pieces(path, [piece.piece for piece in proto.pieces])
    engine = _unigram(proto) if proto.trainer_spec.model_type == UNIGRAM else _piece_pairs(proto)
    engine.add_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == USER_DEFINED])
    engine.add_special_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == CONTROL])
    return engine


def _check_pieces(path: Path, pieces: Sequence[str | bytes]) -> None:
    if not pieces or max(map(len, pieces)) > LONGEST_PIECE:
        raise VocabularyError(f"{path}: has no pieces, or some of more than {LONGEST_PIECE} letters.")


# Fields of a sentencepiece model: a piece each, and a few settings.
MOST_PIECES = 2**20
# Enumerations of sentencepiece_model.proto
UNIGRAM, CONTROL, USER_DEFINED = 1, 3, 4
# What sentencepiece writes for a space.
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def _unigram(proto: Any) -> Tokenizer:
    """T5's way: words apart, each with the mark of a word's beginning."""
    pieces, spec = [(piece.piece, piece.score) for piece in proto.pieces], proto.trainer_spec
    engine = Tokenizer(models.Unigram(pieces, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback))
    if charsmap := proto.normalizer_spec.precompiled_charsmap:
        engine.normalizer = normalizers.Precompiled(charsmap)
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")]
    )
    engine.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    return engine


def _few(pieces: int, splits: Iterable[Any]) -> list[Any]:
    """The ways to make pieces of others, as long as they are as few as in a vocabulary."""
    most = 1000 + MOST_SPLITS * pieces
    found = list(islice(splits, most + 1))
    if len(found) > most:
        raise ValueError("its pieces can be made of others in too many ways")
    return found


def _piece_pairs(proto: Any) -> Tokenizer:
    """Gemma's way: byte pairs over the whole text, a space is a letter, unknown letters are bytes."""
    ranks = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    splits = _few(
        len(ranks),
        (
            (rank, piece[:i], piece[i:])
            for piece, rank in ranks.items()
            for i in range(1, len(piece))
            if piece[:i] in ranks and piece[i:] in ranks
        ),
    )
    merges = [(left, right) for _, left, right in sorted(splits, key=lambda s: (s[0], len(s[1]), len(s[2])))]
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
    """GPT-2's engine, from its `vocab.json`, beside which lies `merges.txt`, or from a tokenizer.json.

    Raises:
        VocabularyError: the file is neither.
    """
    path = Path(path)
    vocabulary: Any
    if path.name.endswith("tokenizer.json"):
        vocabulary, merges = _tokenizer_json(path)
    else:
        beside = path.with_name(path.name.replace("vocab.json", "merges.txt"))
        with refusing(path, f"with {beside.name}, not the vocabulary and merges of GPT-2", VocabularyError):
            vocabulary = checked_ids(read_json(path, VocabularyError, LARGEST_LIST))
            lines = _text(beside).split("\n")
            pairs = (line.split(" ") for line in lines[1:] if line)
            merges = checked_merges([(left, right) for left, right in pairs], vocabulary)
    engine = Tokenizer(models.BPE(vocabulary, merges))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return engine


# How Qwen cuts a text before byte pairs are joined: digits one by one.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@_of_file
def tiktoken_bpe(path: str | Path, words: str = WORDS) -> Tokenizer:
    """tiktoken's engine from its file of ranks: a piece in base64 and its id on each line.

    Raises:
        VocabularyError: the file is not such a list.
    """
    path = Path(path)
    with refusing(path, "not a list of ranks as tiktoken writes it", VocabularyError):
        lines = (line.split() for line in read_bytes(path, LARGEST_LIST, VocabularyError).splitlines() if line)
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in lines}
        checked_ids(ranks)
    _check_pieces(path, list(ranks))
    letters = _byte_letters()
    names = {piece: piece.decode("latin-1").translate(letters) for piece in ranks}
    splits = _few(
        len(ranks),
        (
            (rank, ranks[piece[:i]], ranks[piece[i:]], piece[:i], piece[i:])
            for piece, rank in ranks.items()
            for i in range(1, len(piece))
            if piece[:i] in ranks and piece[i:] in ranks
        ),
    )
    merges = [(names[left], names[right]) for *_, left, right in sorted(splits)]
    engine = Tokenizer(models.BPE({names[piece]: rank for piece, rank in ranks.items()}, merges, ignore_merges=True))
    engine.normalizer = normalizers.NFC()
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    return engine


def cleans_up(engine: Tokenizer) -> bool:
    """Whether transformers 4, with which the originals decode, takes spaces before punctuation out: of GPT-NeoX's byte
    pairs it does, of LLaMA's pieces not."""
    return isinstance(engine.model, models.BPE) and not engine.model.byte_fallback


class PieceTokenizer(HfvlmTokenizer):
    """What transformers' slow LlamaTokenizer made of a sentencepiece model, which LLaMA's descendants were trained on.

    Args:
        legacy: every text begins with a space, and so does what follows a special token; False, as since Vicuna v1.5,
            writes the first of these alone.
        add_bos_token: a text begins with the start token.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, *args: Any, legacy: bool = True, add_bos_token: bool = True, **kwargs: Any):
        self.legacy = legacy
        super().__init__(*args, legacy=legacy, add_bos_token=add_bos_token, **{"padding_side": "left"} | kwargs)

    def __call__(
        self, text: Any = None, *args: Any, padding: Any = False, truncation: Any = False, **kwargs: Any
    ) -> Any:
        """As every tokenizer: nothing is padded or cut unless asked for."""
        return super().__call__(text, *args, padding=padding, truncation=truncation, **kwargs)

    @classmethod
    def from_vocabulary(
        cls,
        path: str | Path,
        *,
        legacy: bool = True,
        add_bos_token: bool = True,
        added: Sequence[str] = (),
        **kwargs: Any,
    ) -> Any:
        """From a sentencepiece `.model`, or a tokenizer.json as it is; `added` tokens get the next ids.

        Raises:
            ImportError: sentencepiece or protobuf is not installed.
            VocabularyError: the file is not such a model.
        """
        path = Path(path)
        engine = engine_from_json(path) if path.suffix == ".json" else _from_sentencepiece(path)
        names = [str(engine.id_to_token(i)) for i in range(3)]
        tokens = dict(zip(("unk_token", "bos_token", "eos_token"), names, strict=True)) | {"pad_token": names[0]}
        if path.suffix != ".json":
            engine.add_special_tokens([AddedToken(names[0], normalized=False)])
            if not legacy:
                engine.normalizer = normalizers.Replace(" ", SPACE)
            decoding = [
                decoders.Replace(SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
            engine.decoder = decoders.Sequence(decoding)
        tokens |= {name: value for name, value in kwargs.items() if name.endswith("_token")}
        with refusing(path, "not a vocabulary of this kind", VocabularyError):
            engine.post_processor = template(engine, tokens["bos_token"] if add_bos_token else "", "")
        engine.add_special_tokens([AddedToken(token, normalized=False) for token in added])
        tokens |= {"clean_up_tokenization_spaces": cleans_up(engine)} | kwargs
        return cls(tokenizer_object=engine, legacy=legacy, add_bos_token=add_bos_token, **tokens)

    def cleaned_text(self, text: str) -> str:
        """With the space that a text begins with, unless it begins with a special token."""
        text = super().cleaned_text(text)
        if self.legacy or not text or text.startswith(tuple(self.added_tokens_encoder)):
            return text
        return f" {text}"
