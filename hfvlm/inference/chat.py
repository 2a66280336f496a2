"""Conversations with models that answer about images and videos."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from hfvlm.checks.ranges import check_generation
from hfvlm.inference.adapters import load_model, processor_of
from hfvlm.inference.placement import find_device
from hfvlm.modeling.compat import new_cache, with_cache
from hfvlm.modeling.image_text import Features
from hfvlm.modeling.streaming import Stream, until


class Chat:
    """A conversation. Each image is encoded once, and earlier messages are not computed again.

    `chat.ask("What is this?", images=["cat.jpg"])`, or `videos=["walk.mp4"]` of a model of videos, answers;
    `chat.stream(...)` yields the answer while it is generated. An answer is the model's to the whole conversation;
    the cache changes nothing but the time.

    Args:
        model: an `hfvlm.modeling.image_text.ImageTextModel`.
        processor: its processor.
        system: the first message, in place of the checkpoint's own.
        **options: of `model.generate`, for all answers; by default the likeliest tokens, at most 512.
    """

    def __init__(self, model: Any, processor: Any, *, system: str | None = None, **options: Any):
        check_generation(options)
        self.model, self.processor, self.lock = model, processor, Lock()
        self.options = {"do_sample": False, "max_new_tokens": 512} | options
        self.system = system
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        system: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> "Chat":
        """Load a folder, an adapter's too.

        Args:
            folder: a local folder or a Hub id.
            system: the first message, in place of the checkpoint's own.
            device: "auto" is a GPU where there is one; None leaves the model where `kwargs` put it.
            **kwargs: of the model's `from_pretrained`: `dtype`, `device_map`, `quantization_config`.

        Raises:
            ValueError: the model generates no text, or there is no such device.
        """
        place = None if device is None else find_device(device)
        model = load_model(folder, AutoModelForImageTextToText, **kwargs).eval()
        return cls(model if place is None else model.to(place), processor_of(folder), system=system)

    def reset(self) -> None:
        """Begin a new conversation.

        Raises:
            RuntimeError: an answer is being generated.
        """
        with self.alone():
            self.forget()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the conversation for one answer.

        Raises:
            RuntimeError: it is locked.
        """
        if not self.lock.acquire(blocking=False):
            raise RuntimeError(
                "This Chat is in the middle of an answer: read it to its end or close it. A Chat is one conversation; "
                "several threads need one each, which may share the model and the processor."
            )
        try:
            yield
        finally:
            self.lock.release()

    def forget(self) -> None:
        """Drop all messages, features and the cache."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        self.counts: list[int] = []  # placeholders of each image or video
        self.features: list[Tensor] = []
        self.cache, self.cached = new_cache(self.model), list[int]()

    def ask(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), **options: Any) -> str:
        """Answer; images stand where the model was trained to have them. Options are of `model.generate`, for this
        answer."""
        check_generation(options)
        with self.alone():
            deque(self.answered(text, images, videos, options), maxlen=0)
            return self.messages[-1]["content"]

    def stream(
        self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), **options: Any
    ) -> Iterator[str]:
        """Yield the answer in pieces. If the iteration ends early, so does the answer, and the turn is dropped.

        Raises:
            RuntimeError: another answer is being generated, as in another thread.
            ValueError: an option of `generate` is out of its range.
        """
        check_generation(options)
        with self.alone():
            yield from self.answered(text, images, videos, options)

    def answered(
        self, text: str, images: Sequence[Any], videos: Sequence[Any], options: Mapping[str, Any]
    ) -> Iterator[str]:
        """Yield the answer in pieces, and remember it."""
        images = self.media(images, videos)
        content = [*({"type": self.processor.modality} for _ in images), {"type": "text", "text": text}]
        message = {"role": "user", "content": content}
        messages = [*self.messages, message]
        (row,) = self.processor.assemble([messages], [list(images)], encoded=self.counts)
        features = [*self.features, *self.encode(row.media, message)]
        inputs = self.inputs(row.ids, row.counts, features)
        tokenizer, stops = self.processor.tokenizer, self.processor.stop_strings
        run = Stream(self.model, tokenizer, stops, {**inputs, **self.options, **options})
        try:
            yield from until(run, stops)
        finally:
            sequence = run.finish()
            self.cached = sequence[: self.cache.get_seq_length()]
        self.counts, self.features = row.counts, features
        # Bytes that form a character only together are streamed apart.
        new = sequence if self.model.config.is_encoder_decoder else sequence[len(row.ids) :]
        answer = tokenizer.decode(new, skip_special_tokens=True)
        answer = "".join(until(iter([answer]), stops)).strip()
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def media(self, images: Sequence[Any], videos: Sequence[Any]) -> Sequence[Any]:
        """Return those of the model's modality, and refuse others."""
        known, foreign = (images, videos) if self.processor.modality == "image" else (videos, images)
        if len(foreign):
            raise ValueError(f"{type(self.model).__name__} takes {self.processor.modality}s alone.")
        return known

    @torch.no_grad()
    def encode(self, media: Sequence[Any], message: dict[str, Any]) -> list[Tensor]:
        """Encode images or videos of a message to features, `(tokens, hidden_size)` each."""
        if not media:
            return []
        modality = self.processor.modality
        inputs = self.processor.media_inputs(media, [[message]]).to(self.model.device).to(self.model.dtype)
        return list(getattr(self.model, f"get_{modality}_features")(**inputs, return_dict=True).pooler_output)

    def inputs(self, ids: list[int], counts: list[int], features: list[Tensor]) -> dict[str, Any]:
        """Prepare inputs of `generate`, which uses the keys and values of the cache again."""
        known = next((i for i, (a, b) in enumerate(zip(ids, self.cached, strict=False)) if a != b), len(self.cached))
        known = self.model.reusable(self.cache, min(known, len(ids) - 1), len(ids))
        end, new = 0, []
        for count, rows in zip(counts, features, strict=True):
            start = ids.index(self.processor.media_token_id, end)
            end = start + count
            if known < end:
                known = min(known, start)
                new.append(rows)
        if (surplus := self.cache.get_seq_length() - known) > 0:
            self.cache.crop(-surplus)
        table = torch.tensor([ids], device=self.model.device)
        inputs = {"input_ids": table, "attention_mask": torch.ones_like(table), **with_cache(self.cache)}
        features_of = {self.processor.modality: Features(pooler_output=new)}  # type: ignore[arg-type]
        return inputs | ({"mm_encoder_outputs": features_of} if new else {})
