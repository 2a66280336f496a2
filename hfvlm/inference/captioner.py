"""Texts that are generated from images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from hfvlm.checks.ranges import check_generation, check_integer
from hfvlm.inference.adapters import load_model, processor_of
from hfvlm.inference.placement import find_device, placed
from hfvlm.media.rows import are_several
from hfvlm.processing.media_text import MediaTextProcessor


class Captioner:
    """Captions, or answers to questions, by any model that generates them.

    Args:
        model: with `generate`, which takes images and, as prompts, texts.
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
        return cls(model.to(find_device(device)), processor_of(folder))

    def __call__(
        self, images: Any, texts: Sequence[str] | str | None = None, *, batch_size: int = 16, **options: Any
    ) -> Any:
        """Generate captions, or what follows each text.

        Args:
            images: one or a list, as `hfvlm.media.read_image` reads them.
            texts: one for each image: a question, or the beginning of a caption.
            batch_size: images that the model takes at a time.
            **options: of `generate`: `num_beams=3`, `max_length=20`.

        Returns:
            A text, of a list a list of texts.

        Raises:
            MediaError: an image cannot be read; the message names it.
            ValueError: a number is out of its range, or there are more or fewer texts than images.
        """
        check_integer("batch_size", batch_size)
        check_generation(options)
        several = are_several(images)
        sources = images if several else [images]
        prompts = None if texts is None else [texts] if isinstance(texts, str) else list(texts)
        if prompts is not None and len(prompts) != len(sources):
            raise ValueError(f"{len(sources)} images need {len(sources)} texts, not {len(prompts)}.")
        generated: list[str] = []
        for i in range(0, len(sources), batch_size):
            part = {"text": prompts[i : i + batch_size]} if prompts else {}
            inputs = self.processor(images=sources[i : i + batch_size], return_tensors="pt", padding=True, **part)
            inputs = placed(inputs, self.model)
            ids = self.model.generate(**inputs, **self.options | options)
            generated += decode_generated(self.processor, ids, inputs)
        return generated if several else generated[0]


def decode_generated(processor: Any, ids: Any, inputs: Mapping[str, Any]) -> list[str]:
    """Decode what `generate` returned for a batch's inputs, without the prompts."""
    if isinstance(processor, MediaTextProcessor):
        return processor.batch_decode(ids, new_tokens_only=inputs)
    decode = getattr(processor, "decode_captions", None)
    return decode(ids) if decode else processor.batch_decode(ids, skip_special_tokens=True)
