"""Fine-tuning of models that answer about images and videos: conversations to batches with labels."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from hfvlm.checks.ranges import check_integer
from hfvlm.processing.assembly import IGNORE, Row, cut, padded
from hfvlm.training.row_trainer import GuardedTrainer

# More words than any conversation has.
MANY = 1_000_000
# Of images without a placeholder.
PLACES = ("first", "random")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
Message = dict[str, Any]


class ChatCollator:
    """Collates examples to `input_ids`, `attention_mask`, `labels`, and the images' inputs, padded on the right.

    Answers alone are trained on, and of LLaVA's checkpoints exactly those tokens that its authors train on. An example
    is a mapping in one of two forms, with images as `hfvlm.media.read_image` takes them; for models of videos, with
    "videos", "video" and `<video>` instead, as `hfvlm.media.read_video` takes them:

    - `{"messages": [{"role": "user", "content": ...}, ...], "images": [...]}`, as in TRL. The content is a text, or a
      list of `{"type": "image"}` (which may hold its "image") and `{"type": "text", "text": ...}`. Images without a
      placeholder in a message come before the first question.
    - `{"conversations": [{"from": "human", "value": "<image>\\n..."}, ...], "image": ...}`, as in LLaVA's own files.

    For `ChatTrainer`, transformers' `Trainer`, or TRL's `SFTTrainer`; all need `remove_unused_columns=False`, and
    TRL's, for videos, `dataset_kwargs={"skip_prepare_dataset": True}`.

    Args:
        processor: an `hfvlm.processing.media_text.MediaTextProcessor`.
        max_length: longer examples are cut, never in an image.
        truncation: "pictures" leaves out images that do not fit, and what follows them; True refuses.
        pad_to_multiple_of: of the batch's length.
        image_place: of images without a placeholder, "first" before the question; "random" before or after it, as
            LLaVA's paper (https://arxiv.org/abs/2304.08485, section 4.2). Which one depends on the example and the
            seed alone. `ChatTrainer` evaluates with "first".
        seed: of "random".
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        truncation: bool | str = True,
        pad_to_multiple_of: int | None = None,
        image_place: str = "first",
        seed: int = 0,
    ):
        if max_length is not None:
            check_integer("max_length", max_length)
        if pad_to_multiple_of is not None:
            check_integer("pad_to_multiple_of", pad_to_multiple_of)
        if truncation not in (True, "pictures"):
            raise ValueError(f"truncation must be True or 'pictures', not {truncation!r}.")
        if image_place not in PLACES:
            raise ValueError(f"image_place must be one of {', '.join(PLACES)}, not {image_place!r}.")
        if image_place == "random" and not getattr(processor, "places_images", False):
            raise ValueError(
                f"image_place: {type(processor).__name__} puts images where its model was trained on them."
            )
        self.processor, self.max_length, self.truncation = processor, max_length, truncation
        self.pad_to_multiple_of, self.image_place = pad_to_multiple_of, image_place
        self.seed = check_integer("seed", seed, 0)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        assembled = [self.row(example, f"example {i}") for i, example in enumerate(examples)]
        rows = [row for row, _ in assembled]
        batch: dict[str, Any] = dict(
            self.processor.tokenizer.pad(
                {"input_ids": [row.ids for row in rows]},
                padding_side="right",
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_tensors="pt",
            )
        )
        batch["labels"] = torch.tensor(padded([row.labels for row in rows], batch["input_ids"].shape[1]))
        if media := [each for row in rows for each in row.media]:
            conversations = [messages for row, messages in assembled if row.media]
            batch |= self.processor.media_inputs(media, conversations)
        return batch

    def row(self, example: Mapping[str, Any], name: str = "example") -> tuple[Row, list[Message]]:
        """Assemble one example, and return its messages with it."""
        modality = self.processor.modality
        after = self.image_place == "random" and drawn(example, self.seed)
        messages, media = read_example(example, self.processor.media_token, modality, after=after)
        messages = self.processor.protected(messages, count_placeholders(messages, media, modality))
        (row,) = self.processor.assemble([messages], media, train=True)
        if self.max_length is not None:
            drop = self.truncation == "pictures"
            row = cut(row, self.processor.media_token_id, self.max_length, drop=drop, name=name)
        return row, messages


class PreferenceCollator:
    """Collates pairs of answers to the inputs of TRL's `DPOTrainer`: conversations with the preferred answers, then
    with the others, as of `ChatCollator`, and `completion_mask`, 1 where a last answer is.

    An example is `{"prompt": ..., "chosen": ..., "rejected": ..., "images": [...]}`, each a text or a list of
    messages. Nothing is cut. TRL's own collator would leave out the start token.

    Args:
        processor: an `hfvlm.processing.media_text.MediaTextProcessor`.
        pad_to_multiple_of: of the batch's length.
    """

    def __init__(self, processor: Any, *, pad_to_multiple_of: int | None = None):
        self.collate = ChatCollator(processor, pad_to_multiple_of=pad_to_multiple_of)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collate(
            [
                dict(example)
                | {"messages": [*turns_of("user", example["prompt"]), *turns_of("assistant", example[answer])]}
                for answer in ("chosen", "rejected")
                for example in examples
            ]
        )
        answered = batch.pop("labels") != IGNORE
        # Which answer a token belongs to; a text begins with none.
        turn = (answered & ~answered.roll(1, dims=1)).cumsum(dim=1)
        batch["completion_mask"] = (answered & (turn == turn.amax(dim=1, keepdim=True))).long()
        return batch


class ChatTrainer(GuardedTrainer):
    """`Trainer` over conversations that are rows of a list or a data set.

    With `train_sampling_strategy="group_by_length"` conversations of about the same length make a batch, those with
    images and those without apart, as LLaVA's authors do (`group_by_modality_length`).
    """

    def _get_dataloader(  # type: ignore[override]
        self, dataset: Any, description: str, batch_size: int, *, is_training: bool = False, **options: Any
    ) -> Any:
        collator: Any = self.data_collator
        if not is_training and getattr(collator, "image_place", "first") != "first":
            first = copy.copy(collator)
            first.image_place = "first"
            self.data_collator = first
        try:
            return super()._get_dataloader(dataset, description, batch_size, is_training=is_training, **options)
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(rows, "__len__"):
            return super()._get_train_sampler(rows)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(size, lengths=[length_of(row) for row in rows])


def in_conversation(processor: Any, name: str) -> Any:
    """Return a processor with the same parts whose conversations have another form that it knows.

    Raises:
        ValueError: it knows one form alone, or not this one.
    """
    known = {each: getattr(processor, each, None) for each in processor.arguments()} | {"chat_template": None}
    if "conversation" not in known:
        raise ValueError(f"conversation: {type(processor).__name__} has one form of conversations alone.")
    given = {each: value for each, value in known.items() if value is not None}
    return type(processor)(**given | {"conversation": name})


def length_of(example: Mapping[str, Any]) -> int:
    """Return the length of a conversation for grouping: its words, and MANY for images or videos.

    TRL's and transformers' own trainers group data sets that have it as a column, `length`.
    """
    texts = [turn["value"] for turn in example.get("conversations", ())]
    given = [example[name] for name in ("image", "images", "video", "videos") if example.get(name) is not None]
    media = any(len(one) > 0 if isinstance(one, list | tuple) else True for one in given)
    for message in example.get("messages", ()):
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        texts += [part["text"] for part in parts if part["type"] == "text"]
        media = media or any(part["type"] in ("image", "video") for part in parts)
    return sum(len(text.split()) for text in texts) + MANY * media


def read_examples(data: str | Path, pictures: str | Path = ".") -> list[dict[str, Any]]:
    """Read examples of a file of JSON or JSON lines, whose images and videos are paths in the folder `pictures`.

    Raises:
        ValueError: the file is no JSON.
    """
    text = Path(data).read_text(encoding="utf-8")
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x]
    except json.JSONDecodeError as error:
        raise ValueError(f"{data}: neither JSON nor JSON lines ({error}).") from error
    for row in rows:
        for name in ("image", "images", "video", "videos"):
            if name in row:
                paths = [row[name]] if isinstance(row[name], str) else row[name]
                row[name] = [str(Path(pictures) / path) for path in paths]
    return rows


def drawn(example: Mapping[str, Any], seed: int) -> bool:
    """Draw yes or no for an example, by its texts and the seed."""
    texts = example.get("conversations", example.get("messages", ()))
    return hashlib.sha256(f"{seed}\n{texts!r}".encode()).digest()[0] % 2 == 1


def read_example(
    example: Mapping[str, Any], token: str, modality: str = "image", *, after: bool = False
) -> tuple[list[Message], list[Any]]:
    """Turn either form into messages, with a placeholder for each image, and the images in their order.

    Images without a placeholder come before the first question, or `after` it. In a content that is a string, `token`
    (or `<image>`) is a placeholder as long as there are images without a part of their own; others are text.
    """
    one, several = modality, f"{modality}s"
    if "conversations" in example:
        messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in example["conversations"]]
        images = example.get(one, example.get(several))
    else:
        messages = [dict(message) for message in example["messages"]]
        images = example.get(several, example.get(one))
    images = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    inside = [
        part[key]
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == modality
        for key in (modality, "path", "url")
        if part.get(key) is not None
    ]
    images = inside or images
    left = len(images) - _parts(messages, modality)
    if token != f"<{modality}>":  # the placeholder of every file; models with another number their images, too
        messages = [_with_parts(message, modality, left) for message in messages]
        left = len(images) - _parts(messages, modality)
    left -= sum(message["content"].count(token) for message in messages if isinstance(message["content"], str))
    first = next((message for message in messages if message["role"] == "user"), None)
    if left > 0 and first is not None:
        content = _with_parts(first, modality, len(images))["content"]
        texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        first["content"] = (
            [*texts, *[{"type": modality, "place": "after"}] * left]
            if after
            else [*[{"type": modality}] * left, *texts]
        )
    return messages, images


def _with_parts(message: Message, modality: str, count: int) -> Message:
    """Give each placeholder in a message's text, at most `count`, a part of its own."""
    if not isinstance(message["content"], str) or count < 1:
        return message
    first, *others = message["content"].split(f"<{modality}>", count)
    parts = [{"type": "text", "text": first}]
    for text in others:
        parts += [{"type": modality}, {"type": "text", "text": text.removeprefix("\n")}]
    return message | {"content": parts if others else first}


def _parts(messages: Sequence[Message], modality: str) -> int:
    contents = (message["content"] for message in messages if not isinstance(message["content"], str))
    return sum(part["type"] == modality for content in contents for part in content)


def count_placeholders(messages: Sequence[Message], images: Sequence[Any], modality: str) -> int:
    """Count the images that have no part of their own, whose placeholders are in contents that are strings."""
    return max(len(images) - _parts(messages, modality), 0)


def turns_of(role: str, content: Any) -> list[Message]:
    """Return the messages of a part of an example: a text is one of that role."""
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)
