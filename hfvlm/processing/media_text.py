"""The base of processors of texts with images or videos in them: the inputs of chat models."""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import islice, takewhile
from math import ceil
from operator import eq
from typing import Any, ClassVar

import numpy as np
from tokenizers import AddedToken
from transformers import ProcessorMixin
from transformers.image_processing_base import BatchFeature

from hfvlm.checks.keywords import check_keywords
from hfvlm.processing.assembly import IGNORE, Row, cut, expand
from hfvlm.processing.base import HfvlmProcessor, call_keywords
from hfvlm.processing.batches import is_empty, listed, texts_of
from hfvlm.processing.protection import Protected, Protector, generated_spans, marks_generation
from hfvlm.processing.settings import flag, whole

# As many placeholders as the texts of a data set contain.
EVERY = 2**31
# Options of texts.
TEXT_OPTIONS = frozenset(
    {
        "add_special_tokens",
        "max_length",
        "pad_to_multiple_of",
        "padding",
        "padding_side",
        "return_mm_token_type_ids",
        "return_tensors",
        "return_text_replacement_offsets",
        "sanitize_control_tokens",
        "truncation",
        "verbose",
    }
)
# Others of transformers', with the values that change nothing.
FIXED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "is_split_into_words": (None, False),
    "return_attention_mask": (None, True),
    "return_length": (None, False),
    "return_offsets_mapping": (None, False),
    "return_overflowing_tokens": (None, False),
    "return_special_tokens_mask": (None, False),
    "return_token_type_ids": (None, False),
    "stride": (None, 0),
    "text_pair": (None,),
    "text_pair_target": (None,),
    "text_target": (None,),
}
# Options of images and videos on which the number of their tokens does not depend.
UNCOUNTED = frozenset({"do_normalize", "do_rescale", "image_mean", "image_std", "resample", "rescale_factor"})
OTHER_MEDIA = ("images", "videos", "audio", "audios")


class MediaTextProcessor(HfvlmProcessor, ABC):
    """Base of processors for models built on `hfvlm.modeling.image_text.ImageTextModel`.

    In a text, `media_token` stands for an image or a video, and becomes as many placeholders as that has tokens. The
    texts between inputs are encoded one by one, as the originals do.
    """

    modality: str  # of the inputs in the texts
    # `media_token` as a token, where no vocabulary has it: the tokenizer gets it, after its last. Texts are encoded
    # around it, so that no model sees it; a server, which encodes a text first, finds one token for each input.
    media_mark: ClassVar[AddedToken | None] = None
    # Options with the values that change nothing.
    fixed_options: ClassVar[Mapping[str, tuple[Any, ...]]] = FIXED_OPTIONS

    def mark_media(self) -> None:
        """Add `media_mark` to the tokenizer, if it is not there."""
        tokenizer, mark = getattr(self, "tokenizer", None), self.media_mark
        if tokenizer is not None and mark is not None and mark.content not in tokenizer.get_vocab():
            tokenizer.add_tokens([mark], special_tokens=True)

    # Inputs with a row for each image, whose pixels have several: servers, which ask for replacements, get lists.
    item_inputs: ClassVar[tuple[str, ...]] = ()

    @property
    def stop_strings(self) -> list[str]:
        """Texts that end an answer, next to the end token."""
        return []

    @property
    def media_token(self) -> str:
        """The text that stands for an image or a video."""
        return getattr(self, f"{self.modality}_token")

    @property
    def media_token_id(self) -> int:
        """The placeholder."""
        return getattr(self, f"{self.modality}_token_id")

    @property
    def media_processor(self) -> Any:
        """The part that prepares images or videos."""
        return getattr(self, self.parts[self.modality])

    @abstractmethod
    def read(self, sources: Any, *, allow_urls: Any = False) -> list[Any]:
        """Read images or videos as `hfvlm.media` does."""

    @abstractmethod
    def count_each(self, media: Sequence[Any], **options: Any) -> list[int]:
        """Count the placeholders of each input; `options` are those of the media processor's call."""

    def asked(self, question: str) -> str:
        content: Any = [{"type": self.modality}, {"type": "text", "text": question}]
        return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    # Messages

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Render messages as transformers does. Special tokens and `media_token` in a message's text are words: they
        are marked in the rendered text (see `hfvlm.processing.protection`), and a call of this processor encodes them
        as words.

        Args:
            conversation: messages, or a list of conversations.
            *args: of transformers' method.
            **kwargs: likewise; with `sanitize_control_tokens=False` texts are trusted, and their tokens are tokens.
                With `return_assistant_tokens_mask=True`, `assistant_masks` are 1 for each token that has a part in
                what the template has in `{% generation %}`.

        Raises:
            TypeError: a keyword that neither transformers, nor the template, nor this processor's call takes.
            ValueError: a mask of what a template does not mark, or of what is not encoded.
        """
        self.check_template_keywords(args[0] if args else kwargs.get("chat_template"), kwargs)
        if kwargs.pop("return_assistant_tokens_mask", False):
            return self.with_assistant_masks(conversation, *args, **kwargs)
        if kwargs.pop("sanitize_control_tokens", True) is not False:
            conversation = self.protected_all(conversation)
            nested = self.protector().nested
            kwargs |= {name: nested(kwargs[name]) for name in ("tools", "documents") if kwargs.get(name)}
        return super().apply_chat_template(conversation, *args, **kwargs)

    def with_assistant_masks(self, conversation: Any, chat_template: Any = None, **kwargs: Any) -> BatchFeature:
        """Render and encode messages as `apply_chat_template`, and mark the tokens that the assistant generates."""
        if not kwargs.get("tokenize") or not kwargs.get("return_dict") or kwargs.get("continue_final_message"):
            raise ValueError(
                "return_assistant_tokens_mask needs tokenize=True and return_dict=True, and whole messages."
            )
        named = self.chat_template if isinstance(self.chat_template, Mapping) else {"default": self.chat_template}
        template = marks_generation(named.get(chat_template or "default", chat_template) or "")
        if template is None:
            raise ValueError(
                "return_assistant_tokens_mask needs a chat template that has what the assistant says between "
                "{% generation %} and {% endgeneration %}."
            )
        inputs = self.apply_chat_template(conversation, chat_template=template, **kwargs)
        if "assistant_masks" not in inputs:
            ids = inputs["input_ids"]
            inputs["assistant_masks"] = ids * 0 if hasattr(ids, "shape") else [[0] * len(row) for row in ids]
        return inputs

    def check_template_keywords(self, template: Any, kwargs: Mapping[str, Any]) -> None:
        """Refuse keywords of `apply_chat_template` that would be swallowed."""
        known = {*inspect.signature(ProcessorMixin.apply_chat_template).parameters, *TEXT_OPTIONS, *self.fixed_options}
        known |= {*call_keywords(self.media_processor), "images", "videos", "sanitize_control_tokens", "tools"}
        known |= {
            "documents",
            "common_kwargs",
            *(f"{group}_kwargs" for group in ("text", "images", "videos", "audio")),
        }
        words = set(re.findall(r"\w+", f"{template or ''} {self.chat_template or ''}"))
        check_keywords(self, set(kwargs) - words, known - {"self", "kwargs"})

    def render(self, messages: Sequence[Any], **options: Any) -> str:
        """Render messages that are protected already."""
        return self.apply_chat_template(list(messages), sanitize_control_tokens=False, **options)

    def protected_all(self, conversation: Any) -> Any:
        """Protect one conversation or several."""
        first = conversation[0] if isinstance(conversation, list | tuple) and conversation else None
        if isinstance(first, list | tuple) or hasattr(first, "messages"):
            return [self.protected(getattr(own, "messages", own)) for own in conversation]
        return self.protected(getattr(conversation, "messages", conversation))

    def protected(self, messages: Sequence[Any], placeholders: int = 0) -> Protected:
        """Mark special tokens in the texts of messages, so that they are encoded as words.

        Args:
            messages: of one conversation; protected ones stay as they are.
            placeholders: how many `media_token` in contents that are plain strings stand for inputs, the first ones.
        """
        if isinstance(messages, Protected):
            return messages
        protector, safe, of_data = self.protector(), Protected(), placeholders == EVERY
        for message in messages:
            content = message.get("content") if isinstance(message, Mapping) else None
            meant = min(placeholders, content.count(self.media_token)) if isinstance(content, str) else 0
            placeholders -= meant
            safe.append(protector.message(message, self.media_token, meant or self.meant(content, of_data=of_data)))
        return safe

    def meant(self, content: Any, *, of_data: bool = False) -> int:
        """Count the `media_token` in a content's texts that stand for inputs; here an input has a part of its own."""
        return 0

    def protector(self) -> Protector:
        """Mark what no message can contain: every special token, `media_token`, and the marks of turns."""
        template = str(self.chat_template or "")
        tokens = {self.media_token, *self.turn_marks}
        for name in self.get_attributes():
            part = getattr(self, name, None)
            added = getattr(part, "added_tokens_decoder", {}) if "tokenizer" in name else {}
            tokens |= {token.content for token in added.values() if token.special or token.content in template}
        return Protector(tokens)

    @property
    def turn_marks(self) -> set[str]:
        """Texts, next to special tokens, that separate turns in training."""
        return set()

    def media_inputs(self, media: Sequence[Any], conversations: Sequence[Sequence[dict[str, Any]]]) -> BatchFeature:
        """Prepare images or videos of conversations as inputs of the model."""
        return self.prepare(self.modality, list(media))

    def inputs_for(self, media: Any, text: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Prepare texts and their media as inputs of the model; see `__call__`."""
        if text is None:
            raise ValueError(
                f"{type(self).__name__} needs text; of the {self.modality} alone it is {self.media_token!r}."
            )
        options, words = self.call_options(kwargs)
        return_tensors = words.pop("return_tensors", return_tensors)
        texts = texts_of(text)
        rows = self.assemble(
            [texts] if isinstance(texts, str) else texts,
            media,
            add_special_tokens=words.get("add_special_tokens", True),
            allow_urls=options.pop("allow_urls", False),
            **options,
        )
        rows, data = self.batch(rows, words, self.modality, self.media_token_id)
        if inputs := [each for row in rows for each in row.media]:
            data |= self.prepare(self.modality, inputs, **{"return_tensors": return_tensors} | options)
        found = BatchFeature(data, tensor_type=return_tensors)
        if words.get("return_text_replacement_offsets"):
            given = [texts] if isinstance(texts, str) else texts
            found["text_replacement_offsets"] = [
                self.replacements(own, row.counts) for own, row in zip(given, rows, strict=True)
            ]
            found.update({name: list(found[name]) for name in self.item_inputs if name in found})
        return found

    def replacements(self, text: str, counts: Sequence[int]) -> list[dict[str, Any]]:
        """Describe what each `media_token` of a text becomes, as transformers' processors and vLLM do.

        Args:
            text: as it was given.
            counts: placeholders of each input.

        Returns:
            For each input its modality as `type`; `text`, the `media_token`, and its first and last character + 1 as
            `span`; `replacement`, a text of that many placeholders, and its `new_span` in the text with all of them.
        """
        found, end, gained = [], 0, 0
        for count in counts:
            start = text.index(self.media_token, end)
            end, new = start + len(self.media_token), self.placeholders(count)
            place = {"span": (start, end), "new_span": (start + gained, start + gained + len(new))}
            found.append({"type": self.modality, "text": self.media_token, "replacement": new} | place)
            gained += len(new) - len(self.media_token)
        return found

    def placeholders(self, count: int) -> str:
        """Spell an input of `count` tokens: its placeholders, and the tokens around them."""
        ids = self.expand(self.encode(self.media_token, add_special_tokens=False), [count])
        return "".join(self.tokenizer.convert_ids_to_tokens(ids))

    def batch(
        self, rows: Sequence[Row], words: Mapping[str, Any], modality: str, token: int
    ) -> tuple[list[Row], dict[str, Any]]:
        """Cut and pad rows, in which `token` is the placeholder of a modality, as the options of a call's texts ask.
        Return the rows, cut, their padded ids and, where some have labels, the masks of these."""
        truncation, limit = words.get("truncation", False), words.get("max_length")
        if truncation and truncation != "do_not_truncate" and limit:
            drop = truncation == "pictures"
            rows = [cut(row, token, limit, drop=drop, name=f"text {i}") for i, row in enumerate(rows)]
        padding = words.get("padding", len(rows) > 1)
        padded = {name: words[name] for name in ("padding_side", "pad_to_multiple_of") if name in words}
        ids = [row.ids for row in rows]
        limit = limit if padding == "max_length" else None
        data = dict(self.tokenizer.pad({"input_ids": ids}, padding=padding, max_length=limit, **padded))
        if words.get("return_mm_token_type_ids"):
            kind = {"image": 1, "video": 2}[modality]
            data["mm_token_type_ids"] = [[kind * (i == token) for i in row] for row in data["input_ids"]]
        masks = [[int(label != IGNORE) for label in row.labels] for row in rows]
        if any(map(any, masks)):
            side = words.get("padding_side") or self.tokenizer.padding_side
            data["assistant_masks"] = [
                aligned(m, len(row), side) for m, row in zip(masks, data["input_ids"], strict=True)
            ]
        return list(rows), data

    def assemble(
        self,
        texts: Sequence[Any],
        media: Any = None,
        *,
        train: bool = False,
        encoded: Sequence[int] = (),
        add_special_tokens: bool = True,
        allow_urls: Any = False,
        **options: Any,
    ) -> list[Row]:
        """Put texts, or conversations, and their media together: ids with placeholders, labels, and the media read.

        Args:
            texts: of each row a text, or the messages of a conversation.
            media: images or videos, or a list of them for each row.
            train: label messages as the authors train on them. Otherwise they are a prompt, to be answered.
            encoded: tokens of each input that the model has encoded already; their placeholders are the first ones.
            add_special_tokens: those that the tokenizer puts around a text.
            allow_urls: read media from the web.
            **options: of the media processor.

        Raises:
            ValueError: the texts have not as many placeholders as there are media.
        """
        rows = [self.row(text, train=train, add_special_tokens=add_special_tokens) for text in texts]
        token, before = self.media_token_id, [list(encoded), *([] for _ in rows[1:])]
        wanted = [ids.count(token) - len(known) for (ids, _), known in zip(rows, before, strict=True)]
        assembled = []
        for (ids, labels), known, own in zip(rows, before, self.read_media(media, wanted, allow_urls), strict=True):
            counts = [*known, *self.count_each(own, **options)]
            assembled.append(Row(self.expand(ids, counts), expand(labels, ids, token, counts), own, counts))
        return assembled

    def row(self, text: Any, *, train: bool = False, add_special_tokens: bool = True) -> tuple[list[int], list[int]]:
        """Encode a text, or the messages of a conversation, with labels, and one placeholder for each input."""
        if train:
            return self.training_row(text)
        if not isinstance(text, str):
            text = self.apply_chat_template(text, add_generation_prompt=True)
        text, spans = generated_spans(text)
        ids = self.encode(text, add_special_tokens=add_special_tokens)
        labels = [IGNORE] * len(ids)
        for span in spans:
            start, end = (
                self.tokens_before(text[:place], ids, add_special_tokens=add_special_tokens) for place in span
            )
            own = slice(int(start), ceil(end))
            labels[own] = ids[own]
        return ids, labels

    def tokens_before(self, text: str, ids: Sequence[int], *, add_special_tokens: bool) -> float:
        """Count the first of the ids of a longer text that are those of this beginning of it; half of the next one,
        too, if that token begins in it."""
        own, whole = self.encode(text, add_special_tokens=add_special_tokens), list(ids)
        if add_special_tokens and (after := self.tokenizer.around()[1]):
            own, whole = (row[: -len(after)] if row[-len(after) :] == after else row for row in (own, whole))
        same = sum(takewhile(bool, map(eq, own, whole)))
        return same + (0.5 if same < min(len(own), len(whole)) else 0)

    def call_options(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Divide the keywords of a call into options of the media processor, and of the texts.

        Raises:
            TypeError: an unknown keyword, naming the nearest one.
            ValueError: a value that a keyword cannot have, or media that the model does not take.
        """
        name, group = type(self).__name__, f"{self.modality}s"
        others = {other: kwargs[other] for other in OTHER_MEDIA if other in kwargs}
        if foreign := sorted(other for other, value in others.items() if not is_empty(value)):
            raise ValueError(f"{name} reads text and {group}, not {', '.join(foreign)}.")
        rest = {word: value for word, value in kwargs.items() if word not in others}
        known = {"text": {*TEXT_OPTIONS, *self.fixed_options}, group: call_keywords(self.media_processor)}
        options = self.options_of(rest, known, flat=("text", group))
        given = {word: value for word, value in options["text"].items() if value is not None}
        words = self.tokenizer.call_defaults | given
        for word, values in self.fixed_options.items():
            if word in words and not any(words[word] is value for value in values):
                raise ValueError(f"{name}: {word} must be {values[-1]}, not {words[word]!r}.")
        for word, check in (("max_length", whole()), ("pad_to_multiple_of", whole()), ("add_special_tokens", flag)):
            if word in words:
                try:
                    check(words[word])
                except ValueError as error:
                    raise ValueError(f"{name}: {word} {error}, not {words[word]!r:.200}.") from error
        if words.get("truncation") not in (None, True, False, "pictures", "longest_first", "do_not_truncate"):
            raise ValueError(f"{name}: truncation must be True, False or 'pictures', not {words['truncation']!r}.")
        return options[group], words

    def batch_decode(self, sequences: Any, *args: Any, new_tokens_only: Any = None, **kwargs: Any) -> Any:
        """Decode as transformers does. With `generate`'s inputs as `new_tokens_only`, decode the answers alone, and
        without special tokens."""
        if new_tokens_only is not None:
            prompt = new_tokens_only["input_ids"].shape[1]
            sequences, kwargs = [row[prompt:] for row in sequences], {"skip_special_tokens": True} | kwargs
        return super().batch_decode(sequences, *args, **kwargs)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode a text, with one `media_token_id` for each input."""
        first, *others = text.split(self.media_token)
        ids = list(self.tokenizer(first, add_special_tokens=add_special_tokens, padding=False)["input_ids"])
        for piece in others:
            ids += [self.media_token_id, *self.tokenizer(piece, add_special_tokens=False, padding=False)["input_ids"]]
        return ids

    def expand(self, row: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Repeat placeholders, by the count of each input."""
        return expand(row, row, self.media_token_id, counts)

    def read_media(self, media: Any, wanted: Sequence[int], allow_urls: Any) -> list[list[Any]]:
        """Read the inputs of each row, which has `wanted` placeholders for them.

        Raises:
            ValueError: there are not as many.
        """
        media = self.batched(media)
        if is_empty(media):
            groups: list[Any] = [[] for _ in wanted]
        elif self.are_by_text(media, wanted):
            groups = [self.batched(own) for own in media]
        else:
            remaining = iter(self.read(media, allow_urls=allow_urls))
            groups = [list(islice(remaining, count)) for count in wanted]
            groups[-1] += list(remaining)
        given = [len(own) for own in groups]
        if given != list(wanted):
            raise ValueError(
                f"The texts have placeholders ({self.media_token!r}) for {wanted} {self.modality}s, but {given} were "
                f"given. Each has one in the text; a chat template puts it for each {{'type': {self.modality!r}}}."
            )
        every = [each for own in groups for each in own]
        read = iter(self.read(every, allow_urls=allow_urls) if every else ())
        return [[next(read) for _ in own] for own in groups]

    def batched(self, media: Any) -> Any:
        """Turn a batch in another container, such as a Series or a generator, into a list."""
        return listed(media)

    def are_by_text(self, media: Any, wanted: Sequence[int]) -> bool:
        """Check whether `media` is a list of lists, one for each text, which have `wanted` placeholders."""
        lists = isinstance(media, list | tuple) and all(isinstance(own, list | tuple | np.ndarray) for own in media)
        return lists and len(media) == len(wanted) and all(isinstance(listed(own), list | tuple) for own in media)

    def training_row(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Encode messages, with labels as the authors train, and one placeholder for each input."""
        ids, labels = self.labelled(self.protected(messages, placeholders=EVERY))
        return ids, [IGNORE if i == self.media_token_id else label for i, label in zip(ids, labels, strict=True)]

    def labelled(self, messages: Protected) -> tuple[list[int], list[int]]:
        """Encode messages, with the ids of answers and of their ends as labels, -100 elsewhere."""
        ids = self.encode(self.render(messages))
        labels = [IGNORE] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.encode(self.render(messages[:i], add_generation_prompt=True))
                through = self.encode(self.render(messages[: i + 1]))
                labels[len(before) : len(through)] = ids[len(before) : len(through)]
        return ids, labels


def aligned(mask: list[int], length: int, side: str) -> list[int]:
    """Pad the mask of a row that is padded on a side."""
    rest = [0] * (length - len(mask))
    return mask + rest if side == "right" else rest + mask
