"""Tokenizers: the text cleaning, padding and truncation that a model was trained with, on `tokenizers`' engines."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import RLock
from typing import Annotated, Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import logging

from hfvlm.checks.files import refusing
from hfvlm.checks.keywords import check_keywords, parameters
from hfvlm.processing.batches import texts_of
from hfvlm.processing.cleaning import CLEANINGS
from hfvlm.processing.protection import PROTECTED, unprotected
from hfvlm.processing.publishing import Published
from hfvlm.processing.settings import LOADING, STORED, Checked, Flag, check_value, one_of, shared, whole
from hfvlm.processing.vocabularies import (
    SPACE,
    VocabularyError,
    cleans_up,
    sentencepiece_engine,
    template,
    uncased_wordpiece,
)

logger = logging.get_logger(__name__)

# Keywords of a tokenizer's call.
TOKENIZER_ARGUMENTS = parameters(PreTrainedTokenizerBase.__call__) | {
    "max_target_length",
    "sanitize_control_tokens",
    "split_special_tokens",
}
PADDINGS = (True, False, "longest", "max_length", "do_not_pad")
# Keywords of a tokenizer's constructor, and fields of tokenizer_config.json.
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
        "model_specific_special_tokens",
        "pad_to_multiple_of",
        "pad_token_type_id",
        "padding_side",
        "post_processor",
        "response_schema",
        "response_template",
        "special_tokens_map_file",
        "stride",
        "tokenizer_class",
        "tokenizer_config_file",
        "tokenizer_file",
        "tokenizer_object",
        "tokenizer_padding",
        "tokenizer_truncation",
        "truncation_strategy",
        "verbose",
        "vocab",
        "vocab_file",
    }
)
# Checks of a call's numbers.
CALL_CHECKS = {
    "max_length": whole(1),
    "max_target_length": whole(1),
    "pad_to_multiple_of": whole(1),
    "stride": whole(0),
}
SIDES = ("left", "right")


def padding_of_calls(value: Any) -> bool | str:
    """Check how texts are padded."""
    if not isinstance(value, bool | str) or value not in PADDINGS:
        raise ValueError(f"must be one of {', '.join(map(str, PADDINGS))}")
    return value


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


class HfvlmTokenizer(Published, Checked, TokenizersBackend):
    """Cleans texts, and pads and truncates as the model was trained unless a call overrides it.

    One tokenizer may be called by several threads at once. Special tokens that `hfvlm.processing.protection`
    has marked in a text are encoded as the words they are.

    Args:
        clean: how texts are cleaned first: "lower" as OpenAI's CLIP, "whitespace" as open_clip for tokenizers of the
            Hub, "repaired" as LanguageBind, "canonical" as open_clip's SigLIP, "case" as big_vision, "caption" and
            "question" as BLIP, "fold" as TensorFlow Text, or "none".
        model_max_length: tokens of the longest text, special tokens included.
        clean_up_tokenization_spaces: take spaces before punctuation out of decoded texts, as the originals' tokenizers
            of word pieces do.
        padding: how calls pad that do not say it; None, as the model was trained.
        max_length: tokens that these calls pad to, if `padding` is "max_length".

    Raises:
        TypeError: an unknown argument.
        ValueError: a value that an argument cannot have.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    # Defaults of the constructor's arguments, and of a call's.
    DEFAULTS: Mapping[str, Any] = {}
    default_padding: bool | str = True
    default_truncation: bool = True
    # Reads a vocabulary, as the original does.
    engine_of: Callable[..., Tokenizer]
    # Sides that texts may be padded on: the model cannot read others.
    padding_sides: tuple[str, ...] = SIDES

    clean: Annotated[str, one_of(*CLEANINGS)]
    model_max_length: Annotated[int, whole(1, 10**31)]
    truncation_side: Annotated[str, one_of(*SIDES)]
    clean_up_tokenization_spaces: Flag
    split_special_tokens: Flag
    padding: Annotated[bool | str | None, padding_of_calls]
    max_length: Annotated[int | None, whole()]

    def __init__(self, clean: str | None = None, model_max_length: int | None = None, **kwargs: Any):
        given = {"clean": clean, "model_max_length": model_max_length}
        defaults = {"clean": "none", "clean_up_tokenization_spaces": False, **self.DEFAULTS}
        kwargs = defaults | {name: value for name, value in given.items() if value is not None} | kwargs
        self.check_settings(kwargs)
        self.clean = kwargs["clean"]
        # transformers stores a max_length by itself, that of the last call: it is meant only with a padding.
        names = ("padding", "max_length") if kwargs.get("padding") == "max_length" else ("padding",)
        self.call_defaults = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        self.lock = EngineLock()
        super().__init__(**{k: v for k, v in kwargs.items() if k not in shared() - self.known_settings()})

    @classmethod
    def from_vocabulary(cls, path: str | Path, **kwargs: Any) -> Any:
        """Make a tokenizer from the file that was released with the weights, or from a tokenizer.json.

        Raises:
            VocabularyError: the file is no such vocabulary.
        """
        return cls(tokenizer_object=cls.engine_of(path), **kwargs)

    @classmethod
    def known_settings(cls) -> frozenset[str]:
        """Return the keywords of the constructor."""
        own = [parameters(base.__init__) for base in cls.__mro__ if issubclass(base, HfvlmTokenizer)]
        return frozenset({*TOKENIZER_SETTINGS, *STORED, *LOADING, *cls.SETTINGS}).union(*own)

    def check_settings(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse arguments of the constructor that are unknown, or have a value that they cannot have.

        Raises:
            TypeError: an unknown argument, naming the nearest one.
            ValueError: naming the argument and what it must be.
        """
        tokens = {name for name, value in kwargs.items() if name.endswith("_token") and isinstance(value, TOKEN)}
        check_keywords(self, kwargs, self.known_settings() - LOADING - STORED, {*LOADING, *STORED, *tokens, *shared()})
        for name in self.SETTINGS:
            if kwargs.get(name) is not None:
                self.checked_value(name, kwargs[name])

    def capped(self, max_length: int | None) -> int:
        """Return a length no longer than the model's."""
        if max_length is not None:
            check_value(self, "max_length", max_length, whole(1))
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
            for name, check in CALL_CHECKS.items():
                if given.get(name) is not None:
                    check_value(self, name, given[name], check)
            self.check_side(given.get("padding_side"))

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "padding_side":
            self.check_side(value)
        super().__setattr__(key, value)

    @classmethod
    def convert_to_native_format(cls, *_: Any, **kwargs: Any) -> dict[str, Any]:
        """Take tokenizer.json as it is: transformers would rebuild the engine of a class that has an `__init__` from
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
        """Encode texts as every tokenizer; without `padding` and `truncation`, as the model was trained.

        Texts may come as a list, a tuple, a generator, an array of strings, a Series or a column.

        Raises:
            TypeError: an unknown keyword, or anything but a text.
            ValueError: a value that a keyword cannot have, no texts, or a missing one.
        """
        self.check_call(kwargs)
        # The texts themselves carry the marks.
        kwargs.pop("sanitize_control_tokens", None)
        options = self.options_of_call(**kwargs, padding=padding, truncation=truncation)
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

    def options_of_call(self, **given: Any) -> dict[str, Any]:
        """Return the options of a call, with the defaults of those that are None."""
        defaults = {"padding": self.default_padding, "truncation": self.default_truncation} | self.call_defaults
        return given | {name: value for name, value in defaults.items() if given.get(name) is None}

    def encode(self, text: Any, text_pair: Any = None, **kwargs: Any) -> list[int]:
        """Encode one text to ids as every tokenizer, neither padded nor cut by default.

        Raises:
            TypeError: an unknown keyword, or anything but a text.
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
        """Split one text into tokens as every tokenizer."""
        self.check_call(kwargs)
        text, pair = self.prepared(text), self.prepared(pair, "pair")
        if is_marked(text):
            return [str(token) for token in self.convert_ids_to_tokens(self.marked_ids(text))]
        with self.lock:
            return super().tokenize(text, pair, *args, **kwargs)

    def pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Pad as every tokenizer.

        Raises:
            ValueError: a side that the model cannot read.
        """
        self.check_side(kwargs.get("padding_side"))
        return super().pad(encoded_inputs, *args, **kwargs)

    def prepared(self, text: Any, name: str = "text", *, words: bool = False) -> Any:
        """Return a text or a list of texts, cleaned; words that are split already as they are."""
        if text is None:
            return None
        text = texts_of(text, name)
        return text if words else self.cleaned(text)

    def cleaned(self, text: Any) -> Any:
        """Clean a text, or the texts of a list, as the model was trained."""
        if isinstance(text, str):
            return self.cleaned_text(text)
        return [self.cleaned_text(item) if isinstance(item, str) else item for item in text]

    def cleaned_text(self, text: str) -> str:
        """Clean one text."""
        return CLEANINGS[self.clean](text)

    def warn_of_cuts(self, text: Any, encoded: BatchEncoding, options: Mapping[str, Any]) -> None:
        """Warn of the texts that lost their end."""
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
        """Encode texts, in some of which special tokens are marked as words."""
        several = not isinstance(text, str)
        before, after = self.around() if add_special_tokens else ([], [])
        room = max_length or (self.model_max_length if truncation else None)
        rows = []
        for item in text if several else [text]:
            ids = self.marked_ids(item)
            if truncation and truncation != "do_not_truncate" and room is not None:
                most = max(room - len(before) - len(after), 0)
                ids = ids[:most] if self.truncation_side == "right" else ids[len(ids) - min(most, len(ids)) :]
            rows.append([*before, *ids, *after])
        known = ("pad_to_multiple_of", "padding_side", "return_attention_mask", "return_tensors")
        given = {name: options[name] for name in known if options.get(name) is not None}
        one = not several and not given.get("return_tensors")
        length = room if padding == "max_length" else None
        return self.pad({"input_ids": rows[0] if one else rows}, padding=padding, max_length=length, **given)

    def marked_ids(self, text: str) -> list[int]:
        """Encode a text without special tokens around it: its tokens are tokens, but for those that are marked."""
        added = self.added_tokens_encoder
        pattern = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
        ids: list[int] = []
        for i, piece in enumerate(re.split(f"({pattern})", text) if added else [text]):
            ids += [added[piece]] if i % 2 else self.plain_ids(unprotected(piece), first=i == 0)
        return ids

    def plain_ids(self, text: str, *, first: bool = True) -> list[int]:
        """Encode a text in which nothing is a token of its own; a piece that is not the `first` follows a token."""
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
        """Whether the beginning of a text is encoded otherwise than text after a token."""
        token = next(iter(self.added_tokens_encoder), None)
        if token is None:
            return False
        with self.lock:
            ids = super().__call__(token + "a", add_special_tokens=False, padding=False, truncation=False)["input_ids"]
        return ids[1:] != self._model_ids("a")

    def around(self) -> tuple[list[int], list[int]]:
        """Return the ids before and after every text."""
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
        """Decode ids to a text, or rows of ids to texts, as every tokenizer.

        Raises:
            TypeError: an unknown keyword.
        """
        check_keywords(self, kwargs, {"spaces_between_special_tokens", "use_source_tokenizer"})
        ids = self.decodable(token_ids, skip=skip_special_tokens)
        # transformers refuses to clean up the texts of byte pairs, which some originals do.
        text: Any = super().decode(ids, skip_special_tokens, clean_up_tokenization_spaces=False)
        clean = clean_up_tokenization_spaces
        if not (self.clean_up_tokenization_spaces if clean is None else clean):
            return text
        return (
            self.clean_up_tokenization(text) if isinstance(text, str) else list(map(self.clean_up_tokenization, text))
        )

    def decodable(self, token_ids: Any, *, skip: bool) -> Any:
        """Return ids as they are decoded; with `skip`, special tokens are left out."""
        return token_ids

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Do nothing: hfvlm is installed code, and a module of it copied next to the weights could not import."""


TOKEN = (str, AddedToken)


def is_marked(text: Any) -> bool:
    """Whether special tokens are marked in a text, or in one of several."""
    texts = text if isinstance(text, list) else [text]
    return any(isinstance(item, str) and PROTECTED in item for item in texts)


class FullLengthTokenizer(HfvlmTokenizer):
    """Always pads to `model_max_length`, on the right: the model was trained on texts of that length. `padding=True`
    means it too, and a longer `max_length` is cut to it."""

    default_padding = "max_length"
    padding_sides = ("right",)

    def options_of_call(self, **given: Any) -> dict[str, Any]:
        options = super().options_of_call(**given)
        full = {"padding": "max_length"} if options["padding"] is True else {}
        return options | full | {"max_length": self.capped(options.get("max_length"))}


class ZeroPaddedTokenizer(FullLengthTokenizer):
    """Pads with id 0, that of "!" within a word. It is no special token of the engine, which would be cut out of
    texts."""

    pad_token_id = 0

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.pop("pad_token", None)
        super().__init__(*args, **kwargs)

    @property
    def pad_token(self) -> str:
        """The piece of id 0."""
        return str(self.convert_ids_to_tokens(self.pad_token_id))


class WordPieceTokenizer(HfvlmTokenizer):
    """Base of the tokenizers of BERT's word pieces, of texts between [CLS] and [SEP]."""

    DEFAULTS = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")} | {
        "clean_up_tokenization_spaces": True
    }
    engine_of: Callable[..., Tokenizer] = staticmethod(uncased_wordpiece)


class PieceTokenizer(HfvlmTokenizer):
    """transformers' slow LlamaTokenizer of a sentencepiece model, with which LLaMA's descendants were trained. Nothing
    is padded or cut by default.

    Args:
        legacy: every text begins with a space, and so does text after a special token; False, as since Vicuna v1.5,
            adds the first of these only.
        add_bos_token: a text begins with the start token.
    """

    DEFAULTS = {"padding_side": "left"}
    default_padding = False
    default_truncation = False

    def __init__(self, *args: Any, legacy: bool = True, add_bos_token: bool = True, **kwargs: Any):
        self.legacy = legacy
        super().__init__(*args, legacy=legacy, add_bos_token=add_bos_token, **kwargs)

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
        """Make a tokenizer from a sentencepiece `.model`, or a tokenizer.json; `added` tokens get the next ids.

        Raises:
            ImportError: sentencepiece or protobuf is not installed.
            VocabularyError: the file is not such a model.
        """
        path = Path(path)
        engine = sentencepiece_engine(path)
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
        """Clean a text, and begin it with a space, unless it begins with a special token."""
        text = super().cleaned_text(text)
        if self.legacy or not text or text.startswith(tuple(self.added_tokens_encoder)):
            return text
        return f" {text}"
