"""BLIP-2's and InstructBLIP's inputs (https://github.com/salesforce/LAVIS at 506965b)."""

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers.image_processing_base import BatchFeature

from hfvlm.media.images import read_images
from hfvlm.models.blip.processing_blip import HfvlmBLIPImageProcessor, HfvlmBLIPTokenizer
from hfvlm.models.blip2.language_blip2 import LANGUAGES, Vicuna
from hfvlm.processing.assembly import IGNORE, Row, padded
from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.batches import is_empty, listed, texts_of
from hfvlm.processing.image_text import ImageTextProcessor
from hfvlm.processing.protection import Protected
from hfvlm.processing.settings import one_of, string, whole
from hfvlm.processing.tokenization import HfvlmTokenizer
from hfvlm.processing.vocabularies import add_placeholders


class HfvlmBLIP2ImageProcessor(HfvlmBLIPImageProcessor):
    """Images as BLIP-2's: converted to RGB, then squashed to a square, bicubic."""

    size = {"height": 224, "width": 224}


class HfvlmBLIP2QFormerTokenizer(HfvlmBLIPTokenizer):
    """The Q-Former's: BERT's word pieces in lower case, and [DEC], which begins generated texts."""

    MARKS = ("[DEC]",)
    DEFAULTS = {**HfvlmBLIPTokenizer.DEFAULTS, "model_max_length": 32}


class HfvlmBLIP2RetrievalProcessor(DualEncoderProcessor):
    """Images and texts to the first stage's inputs: `processor(images=..., text=...)`, then `model(**inputs)`."""


class HfvlmBLIP2Tokenizer(HfvlmTokenizer):
    """The language model's own, with a placeholder token for images and one for videos. Nothing is padded or cut by
    default."""

    default_padding = False
    default_truncation = False

    @classmethod
    def from_vocabulary(
        cls, path: str | Path, *, kind: str = "opt", size: int | None = None, **kwargs: Any
    ) -> "HfvlmBLIP2Tokenizer":
        """Make a tokenizer from the language model's original file.

        Args:
            path: OPT's `vocab.json`, next to which is its `merges.txt`; T5's or LLaMA's sentencepiece `.model`; or a
                tokenizer.json.
            kind: "opt", "t5" or "llama".
            size: rows of the language model's embedding table; rows beyond the vocabulary get names, so that the
                placeholder tokens come after them.
            **kwargs: of the tokenizer.

        Raises:
            ValueError: the file is no such vocabulary, or has more pieces than the model.
        """
        language = LANGUAGES[kind]
        engine, special = language.engine(Path(path))
        add_placeholders(engine, path, size, IMAGE, VIDEO)
        return cls(tokenizer_object=engine, **language.tokenizer_defaults | special | kwargs)


IMAGE, VIDEO = "<image>", "<video>"


# Each image of a message, then its text; answers end in a period where the conversation goes on.
CHAT = (
    "{% for message in messages %}{% if message.content is string %}{% set text = message.content %}{% else %}"
    "{% set text %}{% for part in message.content %}"
    "{{ part.text if part.type == 'text' else '<' + part.type + '>' }}{% endfor %}{% endset %}{% endif %}"
    "{% set words = text | replace('<image>', '') | replace('<video>', '') | trim %}"
    "{{ '<image>' * text.count('<image>') + '<video>' * text.count('<video>') }}"
    "{% if message.role == 'assistant' %}{% generation %}"
    " {{ words }}{% if not loop.last %}. {% endif %}{% endgeneration %}"
    "{% else %}{{ BEFORE + words + AFTER }}{% endif %}{% endfor %}"
)


def default_chat_template(question: str) -> str:
    """Make a template in which a user's turns are put as `question`, with `{}` in the place of their text."""
    before, _, after = question.partition("{}")
    return CHAT.replace("BEFORE", json.dumps(before)).replace("AFTER", json.dumps(after))


class HfvlmBLIP2Processor(ImageTextProcessor):
    """Texts about images to the second stage's inputs: the image first, then the text.

    `processor(images=...)` prepares captioning; in `processor(images=..., text=...)` each image comes before its text,
    unless the texts contain `<image>` themselves.

    Args:
        image_processor: of the images.
        tokenizer: of the texts.
        chat_template: by default each turn of the user's is put as `question`.
        num_queries: tokens of an image, as in the model's configuration.
        prompt: beginning of captions.
        question: the form of a question, with `{}` in its place.
        kind: whose conventions the texts follow, "opt", "t5" or "llama".
    """

    num_queries: Annotated[int, whole(1, 2**16)]
    prompt: Annotated[str, string]
    question: Annotated[str, string]
    kind: Annotated[str, one_of(*LANGUAGES)]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        num_queries: int = 32,
        prompt: str = "a photo of",
        question: str = "Question: {} Answer:",
        kind: str = "opt",
        **kwargs: Any,
    ):
        self.set_arguments(num_queries=num_queries, prompt=prompt, question=question, kind=kind)
        template = chat_template or default_chat_template(question)
        super().__init__(image_processor, tokenizer, chat_template=template, **kwargs)

    @property
    def language(self) -> Vicuna:
        """The conventions of the language model."""
        return LANGUAGES[self.kind]

    def count_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        return [self.num_queries] * len(image_sizes)

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare inputs as `ImageTextProcessor`; without texts, for captions of the images.

        Args:
            images: as there.
            text: likewise.
            videos: in place of images, a video for each text: lists of equally many frames, each of which is read as
                an image.
            **kwargs: as there.
        """
        if not is_empty(videos):
            return self.video_inputs(videos, text, **kwargs)
        images = self.batched(images)
        return super().__call__(images, self.placed(images, text), **kwargs)

    def video_inputs(self, videos: Any, text: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Prepare videos and a prompt about each -> the model's inputs; see `__call__`."""
        if text is None:
            raise ValueError(f"{type(self).__name__} needs a text for each video.")
        options, words = self.call_options(kwargs)
        reading = {"upright": self.image_processor.upright, "allow_urls": options.pop("allow_urls", False)}
        frames = [read_images(list(video), **reading) for video in listed(videos)]
        texts = texts_of(text)
        texts = [texts] if isinstance(texts, str) else texts
        counts = [len(video) for video in frames]
        if len(set(counts)) != 1 or len(counts) != len(texts):
            raise ValueError(
                f"Each text needs a video, and all videos equally many frames: {len(texts)} texts, {counts} frames."
            )
        placeholder = self.tokenizer.convert_tokens_to_ids(VIDEO)
        before, special = counts[0] * self.num_queries, words.get("add_special_tokens", True)
        rows = []
        for item in texts:
            ids, labels = self.row(item.replace(VIDEO, ""), add_special_tokens=special)
            rows.append(Row([placeholder] * before + ids, [IGNORE] * before + labels, [], [before]))
        if words.get("truncation") == "pictures":
            raise ValueError(f"{type(self).__name__}: each text keeps its video; truncation must be True or False.")
        _, batch = self.batch(rows, words, "video", placeholder)
        pixels = self.image_processor([frame for video in frames for frame in video], return_tensors="np", **options)
        pixels = pixels["pixel_values"].reshape(len(frames), counts[0], *pixels["pixel_values"].shape[1:])
        return BatchFeature({**batch, "pixel_values_videos": pixels}, tensor_type=return_tensors)

    def placed(self, images: Any, text: Any) -> Any:
        """Put placeholders for the images before texts that have none; without texts, before the prompt."""
        if is_empty(images):
            return text
        several = isinstance(images, list | tuple)
        if text is None:
            text = [self.prompt] * (len(images) if several else 1)
        texts = texts_of(text)
        texts = [texts] if isinstance(texts, str) else texts
        if any(self.image_token in item for item in texts):
            return texts
        return [self.image_token + item for item in texts]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode a text to ids, with one `image_token_id` for each image. Each piece between images is a text of its
        own, special tokens included."""
        first, *others = text.split(self.image_token)
        ids = self.text_ids(first, add_special_tokens=add_special_tokens) if first or not others else []
        for i, piece in enumerate(others):
            ids.append(self.image_token_id)
            if piece or i + 1 == len(others):
                ids += self.text_ids(piece, add_special_tokens=add_special_tokens)
        return ids

    def text_ids(self, text: str, **options: Any) -> list[int]:
        """Encode a text without images."""
        return list(self.tokenizer(text, padding=False, **options)["input_ids"])

    def captions(self, images: Any, text: Sequence[str]) -> BatchFeature:
        """Prepare images and their captions -> the model's inputs for training, `labels` included."""
        return self.examples(images, [self.prompt] * len(text), text)

    def examples(self, images: Any, text: Sequence[str], answers: Sequence[str]) -> BatchFeature:
        """Prepare images, a prompt about each, and its answer -> the model's inputs for training.

        Args:
            images: one for each text.
            text: prompts, without placeholders for images.
            answers: to be predicted.
        """
        rows = [self.answered(given, answer) for given, answer in zip(text, answers, strict=True)]
        inputs = self(images, list(text))
        media = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        encoded, answered = ([row[i] for row in rows] for i in (0, 1))
        count = self.num_queries
        queries = [self.image_token_id] * count
        batch = self.tokenizer.pad(
            {"input_ids": [queries + ids for ids in encoded]}, padding_side="right", return_tensors="pt"
        )
        labels = torch.tensor(padded([self.language.labels(count, row) for row in answered]))
        return BatchFeature({**batch, "labels": labels, **media})

    def answers(self, text: Sequence[str]) -> Tensor:
        """Encode answers -> `(A, M)` ids with -100 after their end, for the model's `rank`."""
        return torch.tensor(padded([self.answer_ids(answer) for answer in text]))

    def answer_ids(self, answer: str) -> list[int]:
        """Encode an answer as it follows a text, with its end."""
        return self.language.answer(self, answer)

    def answered(self, text: str, answer: str) -> tuple[list[int], list[int]]:
        """Encode a prompt and its answer -> input ids and labels: aligned, or, of T5, the decoder's own ids."""
        return self.language.example(self, text.rstrip(" "), answer)

    def labelled(self, messages: Protected) -> tuple[list[int], list[int]]:
        """Put images first; the last message's answer is trained on.

        Raises:
            ValueError: the language model is a T5.
        """
        self.language.check_conversations()
        *before, last = messages
        given, answer = self.render(before, add_generation_prompt=True), last["content"]
        if not isinstance(answer, str):
            answer = "".join(part["text"] for part in answer if part["type"] == "text")
        images = given.count(self.image_token)
        ids, labels = self.answered(given.replace(self.image_token, ""), answer)
        return [self.image_token_id] * images + ids, [IGNORE] * images + labels

    def batch_decode(self, sequences: Any, *args: Any, new_tokens_only: Any = None, **kwargs: Any) -> list[str]:
        """Decode as transformers does; of T5, which does not repeat the prompt, all tokens are new."""
        new_tokens_only, kwargs = self.language.decoding(new_tokens_only, kwargs)
        texts = super().batch_decode(sequences, *args, new_tokens_only=new_tokens_only, **kwargs)
        return [text.strip() for text in texts]


class HfvlmInstructBLIPProcessor(HfvlmBLIP2Processor):
    """BLIP-2's processor for a Q-Former that takes the texts, too.

    Args:
        qformer_tokenizer: of the Q-Former's texts; too long instructions lose their beginning.
        **kwargs: the others as above.
    """

    # Servers prepare images without the texts, which are part of the inputs here.
    fixed_options = ImageTextProcessor.fixed_options | {"return_text_replacement_offsets": (None, False)}
    qformer_tokenizer: Any

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        qformer_tokenizer: Any = None,
        chat_template: Any = None,
        num_queries: int = 32,
        prompt: str = "A short image description:",
        question: str = "{}",
        kind: str = "llama",
        **kwargs: Any,
    ):
        kwargs["qformer_tokenizer"] = qformer_tokenizer
        super().__init__(image_processor, tokenizer, chat_template, num_queries, prompt, question, kind, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        images, text = self.batched(images), None if text is None else texts_of(text)
        inputs = super().__call__(images, text, videos, **kwargs)
        if "pixel_values" in inputs:
            inputs.update(self.instructions(self.placed(images, text), kwargs.get("return_tensors", "pt")))
        elif "pixel_values_videos" in inputs:
            texts = [text] if isinstance(text, str) else text
            inputs.update(self.instructions([self.image_token + item.replace(VIDEO, "") for item in texts]))
        return inputs

    def media_inputs(self, media: Sequence[Any], conversations: Sequence[Sequence[dict[str, Any]]]) -> BatchFeature:
        """Prepare media with the instructions: of each conversation the messages before the first answer."""
        inputs = super().media_inputs(media, conversations)
        known = [self.protected(own) for own in conversations]
        before = [list(takewhile(lambda message: message["role"] != "assistant", own)) for own in known]
        prompts = [self.render(messages, add_generation_prompt=True) for messages in before]
        inputs.update(self.instructions(prompts))
        return inputs

    def instructions(self, text: Sequence[str], return_tensors: str | None = "pt") -> dict[str, Any]:
        """Encode the Q-Former's text of each image."""
        pieces = [piece for item in text for piece in self.text_of_each(item)]
        encoded = self.qformer_tokenizer(pieces, return_tensors=return_tensors)
        return {f"qformer_{name}": encoded[name] for name in ("input_ids", "attention_mask")}

    def text_of_each(self, text: str) -> list[str]:
        """Return the text after each image, or, where another image follows at once, after that one."""
        pieces = [""]
        for piece in reversed(text.split(self.image_token)[1:]):
            pieces.append(piece or pieces[-1])
        return pieces[:0:-1]
