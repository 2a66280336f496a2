"""What writes instructions: a chat model of transformers, or an endpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from hfvlm.checks.ranges import check_generation
from hfvlm.inference.pins import content_hash
from hfvlm.inference.placement import find_device

# Of a chat model's answers.
GENERATE = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 512}


class Writer(Protocol):
    """Answers messages."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that answers depend on."""

    def __call__(self, messages: Sequence[Mapping[str, str]], seed: int) -> tuple[str, bool]:
        """Return an answer, and whether it is complete."""


class ChatModel:
    """A chat model of transformers, in this process.

    Args:
        folder: of the model, or its Hub id.
        device: "auto" is a GPU where there is one.
        generate: options of `generate`, instead of `GENERATE`.

    Raises:
        ValueError: its tokenizer has no chat template, or an option is out of its range.
    """

    def __init__(self, folder: str | Path, *, device: str = "auto", generate: Mapping[str, Any] | None = None):
        from transformers import pipeline

        self.options = dict(GENERATE if generate is None else generate)
        check_generation(self.options)
        self.folder = str(folder)
        self.pipeline: Any = pipeline("text-generation", model=self.folder, device=find_device(device), dtype="auto")
        self.tokenizer: Any = self.pipeline.tokenizer
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"{folder}: its tokenizer has no chat template: this is no chat model.")

    @property
    def settings(self) -> dict[str, Any]:
        return {"model": self.folder, "weights": content_hash(self.pipeline.model), "generate": self.options}

    def __call__(self, messages: Sequence[Mapping[str, str]], seed: int) -> tuple[str, bool]:
        torch.manual_seed(seed)
        given = [dict(each) for each in messages]
        prompt = self.tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=True)["input_ids"]
        (made,) = self.pipeline(given, return_tensors=True, **self.options)
        ids = made["generated_token_ids"][len(prompt) :]
        ends = self.pipeline.model.generation_config.eos_token_id
        known = set(ends) if isinstance(ends, list) else {ends}
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip(), bool(known & set(ids))
