"""Fine-tuning of models that answer about pictures: conversations to batches with labels."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hfvlm.media_text import IGNORE

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
Message = dict[str, Any]


class ChatCollator:
    """Examples -> `input_ids`, `attention_mask`, `labels`, and the pictures' inputs, padded on the right.

    Answers alone are trained on, and of LLaVA's checkpoints exactly those tokens that its authors train on. An example
    is a mapping in one of two forms, of which the pictures may be whatever `hfvlm.media.read_image` takes; for models
    of films, "videos", "video" and `<video>` stand in their place, and `hfvlm.media.read_video` reads them:

    - `{"messages": [{"role": "user", "content": ...}, ...], "images": [...]}`, as in TRL. The content is a text, or a
      list of `{"type": "image"}` (which may hold its "image") and `{"type": "text", "text": ...}`. Pictures that no
      message has a place for stand before the first question.
    - `{"conversations": [{"from": "human", "value": "<image>\\n..."}, ...], "image": ...}`, as in LLaVA's own files.

    For `transformers.Trainer`, or TRL's `SFTTrainer` with `dataset_kwargs={"skip_prepare_dataset": True}`; both need
    `remove_unused_columns=False`.

    Args:
        processor: an `hfvlm.processing.MediaTextProcessor`.
        max_length: longer examples are cut, never in a picture.
        truncation: "pictures" leaves out pictures that do not fit, and what follows them; True refuses.
        pad_to_multiple_of: of the batch's length.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        truncation: bool | str = True,
        pad_to_multiple_of: int | None = None,
    ):
        self.processor, self.max_length, self.truncation = processor, max_length, truncation
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows, pictures = [], []
        for i, example in enumerate(examples):
            ids, labels, own = self.row(example, f"example {i}")
            rows.append((ids, labels))
            pictures += own
        batch: dict[str, Any] = dict(
            self.processor.tokenizer.pad(
                {"input_ids": [ids for ids, _ in rows]},
                padding_side="right",
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_tensors="pt",
            )
        )
        length = batch["input_ids"].shape[1]
        batch["labels"] = torch.tensor([labels + [IGNORE] * (length - len(labels)) for _, labels in rows])
        if pictures:
            batch |= self.processor.prepare(self.processor.modality, pictures)
        return batch

    def row(self, example: Mapping[str, Any], name: str = "example") -> tuple[list[int], list[int], list[Any]]:
        """One example -> ids, labels and pictures."""
        messages, images = read_example(example, self.processor.media_token, self.processor.modality)
        ids, labels = self.processor.training_row(messages)
        (pictures,) = self.processor.pictures_of([ids], images or None)
        counts = self.processor.count_each(pictures)
        remaining = iter(counts)
        labels = [
            same
            for i, label in zip(ids, labels, strict=True)
            for same in [label] * (next(remaining) if i == self.processor.media_token_id else 1)
        ]
        ids = self.processor.expand(ids, counts)
        if self.max_length:
            drop = self.truncation == "pictures"
            ids, counts = self.processor.cut(ids, counts, self.max_length, drop=drop, name=name)
        return ids, labels[: len(ids)], pictures[: len(counts)]


def read_examples(data: str | Path, pictures: str | Path = ".") -> list[dict[str, Any]]:
    """Examples of a file of JSON or JSON lines, whose pictures and films are paths in the folder `pictures`.

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


def read_example(example: Mapping[str, Any], token: str, modality: str = "image") -> tuple[list[Message], list[Any]]:
    """Either form -> messages, with a place for each picture, and the pictures in their order."""
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
    missing = len(images) - sum(_places(message["content"], token, modality) for message in messages)
    first = next((message for message in messages if message["role"] == "user"), None)
    if missing > 0 and first is not None:
        content = first["content"]
        texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        first["content"] = [{"type": modality}] * missing + texts
    return messages, images


def _places(content: Any, token: str, modality: str) -> int:
    if isinstance(content, str):
        return content.count(token)
    return sum(part["type"] == modality for part in content)
