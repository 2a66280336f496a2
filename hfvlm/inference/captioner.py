"""Texts about pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from hfvlm.checks.ranges import check_generation, check_integer
from hfvlm.inference.adapters import load_model, processor_of
from hfvlm.media.rows import are_several
from hfvlm.processing.media_text import MediaTextProcessor


class Captioner:
    """Writes captions, or answers questions, with any model that is made for it.

    Args:
        model: with `generate`, which takes pictures and, where they begin with something, texts.
        processor: the model's.
        **options: of `generate`, for every call.
    """

    def __init__(self, model: Any, processor: Any, **options: Any):
        check_generation(options)
        self.model, self.processor, self.options = model.eval(), processor, options

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "auto", **kwargs: Any) -> "Captioner":
        """Load a folder, an adapter's too; `kwargs` are of the model's `from_pretrained`, as `dtype`."""
        model: Any = load_model(folder, AutoModelForImageTextToText, **kwargs)
        if device == "auto":
            device = torch.accelerator.current_accelerator() or "cpu"
        return cls(model.to(device), processor_of(folder))

    def __call__(
        self, images: Any, texts: Sequence[str] | str | None = None, *, batch_size: int = 16, **options: Any
    ) -> Any:
        """Captions, or what is written after each text.

        Args:
            images: one picture or a list, as `hfvlm.media.read_image` reads them.
            texts: one for each picture: a question, or the beginning of a caption.
            batch_size: pictures that the model takes at a time.
            **options: of `generate`: `num_beams=3`, `max_length=20`.

        Returns:
            A text, of a list a list of texts.

        Raises:
            MediaError: a picture cannot be read; the message names it.
            ValueError: a number is out of its range, or there are more or fewer texts than pictures.
        """
        check_integer("batch_size", batch_size)
        check_generation(options)
        several = are_several(images)
        sources = images if several else [images]
        asked = None if texts is None else [texts] if isinstance(texts, str) else list(texts)
        if asked is not None and len(asked) != len(sources):
            raise ValueError(f"{len(sources)} pictures need as many texts, not {len(asked)}.")
        written: list[str] = []
        for i in range(0, len(sources), batch_size):
            part = {"text": asked[i : i + batch_size]} if asked else {}
            inputs = self.processor(images=sources[i : i + batch_size], return_tensors="pt", padding=True, **part)
            written += self.write(inputs, **options)
        return written if several else written[0]

    def write(self, inputs: Any, **options: Any) -> list[str]:
        """A batch's inputs -> texts."""
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        inputs = {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        ids = self.model.generate(**inputs, **self.options | options)
        return written(self.processor, ids, inputs)


def written(processor: Any, ids: Any, inputs: Mapping[str, Any]) -> list[str]:
    """What `generate` made of a batch's inputs, without what it was to go on from."""
    if isinstance(processor, MediaTextProcessor):
        return processor.batch_decode(ids, new_tokens_only=inputs)
    decode = getattr(processor, "decode_captions", None)
    return decode(ids) if decode else processor.batch_decode(ids, skip_special_tokens=True)
