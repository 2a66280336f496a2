"""Inputs of Flamingo (https://github.com/mlfoundations/open_flamingo at 655f693: src/factory.py,
train/train_utils.py, eval/models/open_flamingo.py)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers.image_processing_base import BatchFeature

from hfvlm.media.video import Video, read_videos
from hfvlm.models.clip.processing_clip import HfvlmCLIPImageProcessor
from hfvlm.processing.assembly import IGNORE, cut, padded
from hfvlm.processing.batches import flat_images, is_empty, listed, texts_of
from hfvlm.processing.image_text import ImageTextProcessor
from hfvlm.processing.settings import whole
from hfvlm.processing.tokenization import HfvlmTokenizer, PieceTokenizer
from hfvlm.processing.vocabularies import byte_pairs, cleans_up, engine_from_json, template

IMAGE, ENDOFCHUNK, PADDING = "<image>", "<|endofchunk|>", "<PAD>"
# What ends a whole text, of one language model or another.
ENDS = ("<|endoftext|>", "</s>")
# The authors' prompts in evaluation: the text of an image up to the answer.
TASKS = {
    "caption": f"{IMAGE}Output:",
    "vqa": f"{IMAGE}Question:{{question}} Short answer:",
    "classify": f"{IMAGE}Output:",
    "hateful_memes": f"{IMAGE}is an image with: '{{text}}' written on it. Is it hateful? Answer:",
}
# An image's text and the answer, for each example.
TEMPLATE = (
    "{% macro text_of(message) %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video') %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% endmacro %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ text_of(message) }}<|endofchunk|>{% endgeneration %}"
    "{% else %}{{ text_of(message) }}{% endif %}"
    "{% endfor %}"
)


OPT_PADDING = "<pad>"


def _byte_pairs(path: Path) -> Tokenizer:
    """Read GPT-2's engine; OPT's begins every text with its end token."""
    engine = byte_pairs(path)
    if engine.token_to_id(ENDS[0]) is None and engine.token_to_id(ENDS[1]) is not None:
        engine.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", OPT_PADDING, ENDS[1], "<unk>")])
        engine.post_processor = template(engine, ENDS[1], "")
    else:
        engine.add_special_tokens([AddedToken(ENDS[0], normalized=False)])
    return engine


class HfvlmFlamingoImageProcessor(HfvlmCLIPImageProcessor):
    """Images as the CLIP inside was trained on them."""


class HfvlmFlamingoTokenizer(HfvlmTokenizer):
    """The language model's own, with tokens for images, the ends of their texts, and padding."""

    DEFAULTS = {"eos_token": ENDOFCHUNK, "pad_token": PADDING, "padding_side": "left"}
    default_padding = False
    default_truncation = False

    @classmethod
    def from_vocabulary(cls, path: str | Path, **kwargs: Any) -> "HfvlmFlamingoTokenizer":
        """Build it from the language model's tokenizer.json, LLaMA's tokenizer.model, or the vocab.json and
        merges.txt of OPT and others that split texts as GPT-2; those of the three tokens that a vocabulary lacks get
        the next ids. OPT's has a token of its own for padding.

        Raises:
            ImportError: sentencepiece or protobuf is not installed.
            ValueError: the file is not such a model.
        """
        path = Path(path)
        if path.name.endswith("vocab.json"):
            engine = _byte_pairs(path)
        elif path.suffix == ".json":
            engine = engine_from_json(path)
        else:
            engine = PieceTokenizer.from_vocabulary(path).backend_tokenizer
        padding = OPT_PADDING if engine.token_to_id(OPT_PADDING) == 1 else PADDING
        defaults: dict[str, Any] = {"clean_up_tokenization_spaces": cleans_up(engine), "pad_token": padding}
        added = (ENDOFCHUNK, IMAGE, padding)
        engine.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
        return cls(tokenizer_object=engine, **defaults | kwargs)

    @property
    def end_of_text(self) -> str:
        """The token that ends a whole text for the language model; the end of an image's text is another.

        Raises:
            ValueError: the vocabulary has none that is known.
        """
        known = self.get_vocab()
        if found := [token for token in ENDS if token in known]:
            return found[0]
        raise ValueError(f"{type(self).__name__}: the vocabulary has none of {', '.join(ENDS)}, which end a text.")


class HfvlmFlamingoProcessor(ImageTextProcessor):
    """Texts with images or videos among them. In a text, `<image>` stands for an image or a video, and the text up to
    `<|endofchunk|>` is about that.

    Args:
        image_processor: of the images, and of the frames of videos.
        tokenizer: of the texts.
        chat_template: by default the messages one after the other.
        num_frames: taken of a video, from the middles of as many equal parts; of a shorter one all. The paper trains
            on 8, one a second, and evaluates on 30, three a second.
    """

    num_frames: Annotated[int, whole(1, 2**16)]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        num_frames: int = 8,
        **kwargs: Any,
    ):
        self.set_arguments(num_frames=num_frames)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or TEMPLATE, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare inputs as `ImageTextProcessor`.

        Args:
            images: as there; among them there may be videos that `hfvlm.media.read_video` returned.
            text: likewise.
            videos: in place of images, a video, a list, or a list of lists, one for each text, as
                `hfvlm.media.read_videos` takes them.
            **kwargs: as there.

        Returns:
            Of images `pixel_values` `(images, 3, H, W)`; where there is a video, `(inputs, frames, 3, H, W)`, and in
            `num_frames` `(inputs,)` how many of the frames each has.

        Raises:
            ValueError: images and videos are given; or texts and media do not fit each other.
        """
        if not is_empty(videos):
            if not is_empty(images):
                raise ValueError(
                    f"{type(self).__name__} reads images or videos: put videos that hfvlm.media.read_video "
                    "returns among the images."
                )
            texts = [] if text is None else texts_of(text)
            images = self.read_by_text(videos, [texts] if isinstance(texts, str) else texts, kwargs.get("allow_urls"))
        return super().__call__(images, text, **kwargs)

    def read_by_text(self, videos: Any, texts: Sequence[Any], allow_urls: Any) -> list[Any]:
        """Read videos in their order. A list of lists is one for each text where the counts fit, and no image is in
        it, which would be a frame."""
        videos = listed(videos)
        lists = isinstance(videos, list | tuple) and all(isinstance(own, list | tuple) for own in videos)
        lists = lists and not any(isinstance(each, Image.Image) for own in videos for each in own)
        if lists and [len(own) for own in videos] == [str(text).count(self.image_token) for text in texts]:
            videos = [video for own in videos for video in own]
        return read_videos(videos, allow_urls=allow_urls or False)

    def read(self, sources: Any, *, allow_urls: Any = False) -> list[Any]:
        every = flat_images(sources)
        images = [source for source in every if not isinstance(source, Video)]
        read = iter(super().read(images, allow_urls=allow_urls) if images else ())
        return [source if isinstance(source, Video) else next(read) for source in every]

    def count_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Count one placeholder for each image, whose tokens are no part of the text."""
        return [1] * len(image_sizes)

    def count_each(self, media: Sequence[Any], **options: Any) -> list[int]:
        return [1] * len(media)

    def frames_of(self, source: Any) -> list[Any]:
        """Take the frames of a video, `(H, W, 3)` each; those of an image are itself."""
        if not isinstance(source, Video):
            return [source]
        count = min(len(source), self.num_frames)
        return list(source.frames([(2 * i + 1) * len(source) // (2 * count) for i in range(count)]))

    def prepare(self, modality: str, sources: Any, return_tensors: str | None = "pt", **options: Any) -> BatchFeature:
        """Prepare images, and with videos among them the frames of all, padded at their end."""
        if modality != "image" or not (isinstance(sources, list) and any(isinstance(s, Video) for s in sources)):
            return super().prepare(modality, sources, return_tensors, **options)
        frames = [self.frames_of(source) for source in sources]
        counts = [len(own) for own in frames]
        flat = super().prepare(modality, [frame for own in frames for frame in own], "np", **options)["pixel_values"]
        pixels = np.zeros((len(counts), max(counts), *flat.shape[1:]), flat.dtype)
        for row, own in zip(pixels, np.split(flat, np.cumsum(counts)[:-1]), strict=True):
            row[: len(own)] = own
        return BatchFeature({"pixel_values": pixels, "num_frames": np.array(counts)}, tensor_type=return_tensors)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode a text in one piece."""
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, padding=False)["input_ids"])

    def few_shot(self, task: str, shots: Sequence[Mapping[str, str]] = (), **query: str) -> str:
        """Return a prompt of the authors' evaluation: some examples, and a query.

        `processor.few_shot("vqa", [{"question": "What is it?", "answer": "a cat"}], question="How many?")`; each
        example and the query have an image, in this order.

        Args:
            task: "caption", "vqa", "classify" or "hateful_memes"; or a text of one's own with `<image>` and, in
                braces, names of its variables.
            shots: of each example the task's variables ("question", "text"), and its "answer". Special tokens in these
                are words, as in messages.
            **query: the task's variables.

        Raises:
            ValueError: a variable of the task is missing.
        """
        form = TASKS.get(task, task)
        if IMAGE not in form:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, or a text with {IMAGE}, not {task!r}.")
        protector = self.protector()
        known = [protector.nested(dict(shot)) for shot in shots]
        try:
            examples = [f"{form.format(**shot)}{shot['answer']}{ENDOFCHUNK}" for shot in known]
            return "".join([*examples, form.format(**protector.nested(query))])
        except KeyError as error:
            raise ValueError(
                f"task {task!r} needs {error.args[0]!r} of the query, and of each shot with its answer."
            ) from error

    def captions(self, images: Any, text: Sequence[str], *, max_length: int | None = None) -> BatchFeature:
        """Prepare the authors' two kinds of examples for training, `labels` included, padded on the right.

        A text without `<image>` is the caption of its image. One with `<image>` is a page, in which each stands before
        the text about it.

        Args:
            images: of each text an image or a video, or a list of them.
            text: the captions and pages. Special tokens in a caption are words.
            max_length: of the longest example in tokens; what is left of longer ones ends before the image that does
                not fit. The authors' captions have 32, their pages 256.
        """
        media = [own if isinstance(own, list | tuple) else [own] for own in images]
        pages = [self.image_token in each for each in text]
        texts = [self.page(each) if page else self.caption(each) for each, page in zip(text, pages, strict=True)]
        rows = self.assemble(texts, media)
        if max_length is not None:
            rows = [cut(row, self.image_token_id, max_length, drop=True, name="a text") for row in rows]
        batch = self.tokenizer.pad({"input_ids": [r.ids for r in rows]}, padding_side="right", return_tensors="pt")
        labels = [
            self.labels(torch.tensor([row.ids]), interleaved=page)[0].tolist()
            for row, page in zip(rows, pages, strict=True)
        ]
        inputs = {**batch, "labels": torch.tensor(padded(labels))}
        if every := [each for row in rows for each in row.media]:
            inputs |= self.prepare("image", every)
        return BatchFeature(inputs)

    def caption(self, text: str) -> str:
        """Make the authors' example of an image and its caption."""
        return f"{IMAGE}{self.protector().text(text.strip())}{ENDOFCHUNK}{self.tokenizer.end_of_text}"

    def page(self, text: str) -> str:
        """Make the authors' example of a page: the text about an image ends where the next one stands."""
        if ENDOFCHUNK not in text:
            text = text.replace(IMAGE, f"{ENDOFCHUNK}{IMAGE}").replace(ENDOFCHUNK, "", 1)
        for spaced, close in ((f" {ENDOFCHUNK}", ENDOFCHUNK), (f"{IMAGE} ", IMAGE), (f" {IMAGE}", IMAGE)):
            text = text.replace(spaced, close)
        return f"{text.removesuffix(ENDOFCHUNK)}{ENDOFCHUNK}{self.tokenizer.end_of_text}"

    def labels(self, input_ids: Tensor, *, interleaved: bool = True) -> Tensor:
        """Label the ids `(B, N)` that the authors train on, -100 elsewhere: never padding or an image token.

        Args:
            interleaved: of pages with images among their texts, label only texts about an image: from its token up to
                `<|endofchunk|>`. False labels all, as with one caption an image.
        """
        left_out = (input_ids == self.image_token_id) | (input_ids == self.tokenizer.pad_token_id)
        if interleaved:
            left_out |= ~self.about_images(input_ids)
        return input_ids.masked_fill(left_out, IGNORE)

    def about_images(self, input_ids: Tensor) -> Tensor:
        """Mask ids `(B, N)`, True from an image token through the end of its text."""
        numbers = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        ends = input_ids == self.tokenizer.convert_tokens_to_ids(ENDOFCHUNK)
        last_image = ((input_ids == self.image_token_id) * numbers).cummax(dim=1).values
        # Of the ends that stand before a token.
        last_end = (ends * numbers).cummax(dim=1).values.roll(1, dims=1)
        last_end[:, 0] = 0
        return last_image > last_end
