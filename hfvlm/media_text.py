"""Processors of texts with pictures or films in them: what chat models are fed."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from transformers.image_processing_base import BatchFeature

from hfvlm.media.images import read_images
from hfvlm.media.video import read_videos
from hfvlm.processing import FOREIGN_OPTIONS, HfvlmProcessor

# The label that no loss is computed of.
IGNORE = -100


class MediaTextProcessor(HfvlmProcessor, ABC):
    """Texts with pictures or films in them, for models built on `hfvlm.image_text.ImageTextModel`.

    In a text, `media_token` stands for a picture, and becomes as many placeholders as the picture has tokens. The
    texts between pictures are encoded one by one, as the originals do. Films are pictures of another modality.
    """

    modality: str  # of what stands in the texts

    @property
    def stop_strings(self) -> list[str]:
        """Texts that end an answer beside the end token."""
        return []

    @property
    def media_token(self) -> str:
        """What stands for a picture in a text."""
        return getattr(self, f"{self.modality}_token")

    @property
    def media_token_id(self) -> int:
        """The placeholder."""
        return getattr(self, f"{self.modality}_token_id")

    @property
    def media_processor(self) -> Any:
        """The part that prepares pictures."""
        return getattr(self, self.parts[self.modality])

    @abstractmethod
    def read(self, sources: Any, *, allow_urls: Any = False) -> list[Any]:
        """Pictures as `hfvlm.media` reads them."""

    @abstractmethod
    def count_each(self, media: Sequence[Any], **options: Any) -> list[int]:
        """Placeholders of each picture; `options` are those that the media processor will be called with."""

    def asked(self, question: str) -> str:
        content: Any = [{"type": self.modality}, {"type": "text", "text": question}]
        return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def media_inputs(self, media: Sequence[Any], conversations: Sequence[Sequence[dict[str, Any]]]) -> BatchFeature:
        """Pictures, and the messages that they stand in -> what the model encodes them from."""
        return self.prepare(self.modality, list(media))

    def inputs_for(
        self,
        media: Any,
        text: Any,
        return_tensors: str | None = "pt",
        *,
        max_length: int | None = None,
        truncation: bool | str = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts and their pictures -> the model's inputs; see `__call__`."""
        if text is None:
            raise ValueError(
                f"{type(self).__name__} needs text; of the {self.modality} alone it is {self.media_token!r}."
            )
        texts = [text] if isinstance(text, str) else list(text)
        for_media = {*self.media_processor.SETTINGS, *FOREIGN_OPTIONS, "allow_urls"}
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in for_media}
        special = kwargs.pop("add_special_tokens", True)
        rows = [self.encode(item, add_special_tokens=special) for item in texts]
        pictures = self.pictures_of(rows, media, allow_urls=options.pop("allow_urls", False))
        expanded, kept = [], []
        for i, (row, own) in enumerate(zip(rows, pictures, strict=True)):
            counts = self.count_each(own, **options)
            whole = self.expand(row, counts)
            if truncation and max_length:
                whole, counts = self.cut(whole, counts, max_length, drop=truncation == "pictures", name=f"text {i}")
            expanded.append(whole)
            kept += own[: len(counts)]
        padding = kwargs.pop("padding", len(expanded) > 1)
        padded = {name: kwargs.pop(name) for name in ("padding_side", "pad_to_multiple_of") if name in kwargs}
        if unknown := sorted(
            set(kwargs) - {"images", "videos", "audio", "return_mm_token_type_ids", "sanitize_control_tokens"}
        ):
            raise TypeError(f"{type(self).__name__} has no option {', '.join(unknown)}.")
        limit = max_length if padding == "max_length" else None
        data = dict(self.tokenizer.pad({"input_ids": expanded}, padding=padding, max_length=limit, **padded))
        if kept:
            data |= self.media_processor(kept, return_tensors=return_tensors, **options)
        return BatchFeature(data, tensor_type=return_tensors)

    def batch_decode(self, sequences: Any, *args: Any, new_tokens_only: Any = None, **kwargs: Any) -> Any:
        """As transformers'. With `generate`'s inputs as `new_tokens_only`, of the answers alone, and without special
        tokens."""
        if new_tokens_only is not None:
            prompt = new_tokens_only["input_ids"].shape[1]
            sequences, kwargs = [row[prompt:] for row in sequences], {"skip_special_tokens": True} | kwargs
        return super().batch_decode(sequences, *args, **kwargs)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A text to ids, with one `media_token_id` for each picture."""
        first, *others = text.split(self.media_token)
        ids = list(self.tokenizer(first, add_special_tokens=add_special_tokens)["input_ids"])
        for piece in others:
            ids += [self.media_token_id, *self.tokenizer(piece, add_special_tokens=False)["input_ids"]]
        return ids

    def expand(self, row: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Ids with `counts` placeholders for each picture."""
        remaining = iter(counts)
        return [same for item in row for same in [item] * (next(remaining) if item == self.media_token_id else 1)]

    def cut(
        self, row: list[int], counts: list[int], length: int, *, drop: bool, name: str
    ) -> tuple[list[int], list[int]]:
        """The first `length` ids of an expanded row, without a picture that is not whole, and its pictures' counts."""
        if len(row) <= length:
            return row, counts
        ends, place, kept = [], 0, 0
        for count in counts:
            place = row.index(self.media_token_id, place) + count
            ends.append(place)
        kept = sum(end <= length for end in ends)
        if kept < len(counts) and not drop:
            raise ValueError(
                f"{name} has {len(row)} tokens with its pictures, of {counts} tokens, and max_length {length} leaves "
                f"room for {kept} of them: raise max_length, or pass truncation='pictures' to drop the others."
            )
        start = ends[kept] - counts[kept] if kept < len(counts) else length
        return row[: min(start, length)], counts[:kept]

    def pictures_of(self, rows: Sequence[Sequence[int]], media: Any, *, allow_urls: Any = False) -> list[list[Any]]:
        """The pictures of each row, read; as many as it has places for them."""
        wanted = [sum(item == self.media_token_id for item in row) for row in rows]
        if media is None:
            groups: list[Any] = [[] for _ in rows]
        elif self.are_by_text(media, wanted):
            groups = [list(own) for own in media]
        else:
            remaining = iter(self.read(media, allow_urls=allow_urls))
            groups = [[picture for _, picture in zip(range(count), remaining, strict=False)] for count in wanted]
            groups[-1] += list(remaining)
        given = [len(own) for own in groups]
        if given != wanted:
            kind = "pictures" if self.modality == "image" else f"{self.modality}s"
            raise ValueError(
                f"The texts have places ({self.media_token!r}) for {wanted} {kind}, but {given} were given. Each has "
                f"one place in the text; a chat template writes it for each {{'type': {self.modality!r}}}."
            )
        every = [picture for own in groups for picture in own]
        read = iter(self.read(every, allow_urls=allow_urls) if every else ())
        return [[next(read) for _ in own] for own in groups]

    def are_by_text(self, media: Any, wanted: Sequence[int]) -> bool:
        """Whether `media` is a list of lists, one for each text, which have so many places."""
        return (
            isinstance(media, list | tuple) and len(media) > 0 and all(isinstance(own, list | tuple) for own in media)
        )

    def training_row(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Messages -> ids and labels, each with one `media_token_id` for each picture. Answers are trained on, with
        what ends them; -100 elsewhere."""
        messages = [dict(message) for message in messages]
        ids = self.encode(self.apply_chat_template(messages))
        labels = [IGNORE] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.encode(self.apply_chat_template(messages[:i], add_generation_prompt=True))
                through = self.encode(self.apply_chat_template(messages[: i + 1]))
                labels[len(before) : len(through)] = ids[len(before) : len(through)]
        return ids, labels


class ImageTextProcessor(MediaTextProcessor):
    """Texts with pictures in them. A subclass says in `count_tokens` how many tokens pictures have."""

    modality = "image"
    image_token = "<image>"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @abstractmethod
    def count_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Placeholders of pictures of these heights and widths in pixels."""

    def count_each(self, media: Sequence[Any], **options: Any) -> list[int]:
        return self.count_tokens([(picture.height, picture.width) for picture in media])

    def read(self, sources: Any, *, allow_urls: Any = False) -> list[Any]:
        return read_images(sources, upright=self.media_processor.upright, allow_urls=allow_urls)

    def __call__(
        self, images: Any = None, text: Any = None, return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Texts and their pictures -> the model's inputs, padded where there are several.

        Args:
            images: one picture, a list, or a list of lists, one for each text; see `hfvlm.media.read_image`.
            text: one text or a list, with `image_token` where each picture is.
            return_tensors: "pt", "np", or None for lists.
            **kwargs: `max_length`, tokens of the longest row; `truncation` to cut longer rows, never in a picture:
                "pictures" drops those that do not fit, and what follows them, True refuses; `padding`,
                `padding_side`, `pad_to_multiple_of` of the tokenizer; and options of the image processor.

        Raises:
            ValueError: texts and pictures do not fit each other, or a row does not fit `max_length`.
        """
        return self.inputs_for(images, text, return_tensors, **kwargs)


class VideoTextProcessor(MediaTextProcessor):
    """Texts with films in them. A subclass says in `count_tokens` how many tokens they have."""

    modality = "video"
    parts = {"video": "video_feature_extractor", "text": "tokenizer"}
    video_token = "<video>"

    def __init__(
        self, video_feature_extractor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any
    ):
        super().__init__(video_feature_extractor, tokenizer, chat_template=chat_template, **kwargs)

    @property
    def video_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.video_token)

    @abstractmethod
    def count_tokens(self, num_frames: Sequence[int]) -> list[int]:
        """Placeholders of films of which so many frames are taken."""

    def count_each(self, media: Sequence[Any], **options: Any) -> list[int]:
        settings = self.media_processor.settings_for(options, (*FOREIGN_OPTIONS, *self.media_processor.SOURCE_OPTIONS))
        return self.count_tokens([len(self.media_processor.places(film, settings)) for film in media])

    def read(self, sources: Any, *, allow_urls: Any = False) -> list[Any]:
        return read_videos(sources, allow_urls=allow_urls)

    def are_by_text(self, media: Any, wanted: Sequence[int]) -> bool:
        """A list inside a list may be one film's frames, too."""
        return super().are_by_text(media, wanted) and [len(own) for own in media] == list(wanted)

    def __call__(
        self,
        images: None = None,
        text: Any = None,
        videos: Any = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts and their films -> the model's inputs, padded where there are several.

        Args:
            images: none; the host's order of arguments.
            text: one text or a list, with `video_token` where each film is.
            videos: one film, a list, or a list of lists, one for each text; see `hfvlm.media.read_videos`.
            return_tensors: "pt", "np", or None for lists.
            **kwargs: `max_length`, tokens of the longest row; `truncation` to cut longer rows, never in a film:
                "pictures" drops those that do not fit, and what follows them, True refuses; `padding`,
                `padding_side`, `pad_to_multiple_of` of the tokenizer; and options of the feature extractor.

        Raises:
            ValueError: texts and films do not fit each other, or a row does not fit `max_length`; or pictures are
                given: they are films of one frame, `videos=[[picture]]`.
        """
        if images is not None:
            raise ValueError(f"{type(self).__name__} reads films: give a picture as one of a frame, [[picture]].")
        return self.inputs_for(videos, text, return_tensors, **kwargs)
