"""Inputs of Flamingo (https://github.com/mlfoundations/open_flamingo at 655f693: src/factory.py,
train/train_utils.py, eval/models/open_flamingo.py)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from hfvlm.models.clip.processing_clip import HfvlmCLIPImageProcessor
from hfvlm.processing.assembly import IGNORE
from hfvlm.processing.media_text import ImageTextProcessor
from hfvlm.processing.tokenization import HfvlmTokenizer, PieceTokenizer
from hfvlm.processing.vocabularies import cleans_up, engine_from_json

IMAGE, ENDOFCHUNK, PADDING = "<image>", "<|endofchunk|>", "<PAD>"
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
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% endmacro %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ text_of(message) }}<|endofchunk|>{% endgeneration %}"
    "{% else %}{{ text_of(message) }}{% endif %}"
    "{% endfor %}"
)


class HfvlmFlamingoImageProcessor(HfvlmCLIPImageProcessor):
    """Images as the CLIP inside was trained on them."""


class HfvlmFlamingoTokenizer(HfvlmTokenizer):
    """The language model's own, with tokens for images, the ends of their texts, and padding."""

    DEFAULTS = {"eos_token": ENDOFCHUNK, "pad_token": PADDING, "padding_side": "left"}
    default_padding = False
    default_truncation = False

    @classmethod
    def from_vocabulary(cls, path: str | Path, **kwargs: Any) -> "HfvlmFlamingoTokenizer":
        """Build it from the language model's tokenizer.json, or LLaMA's tokenizer.model; those of the three
        tokens that a vocabulary lacks get the next ids.

        Raises:
            ImportError: sentencepiece or protobuf is not installed.
            ValueError: the file is not such a model.
        """
        path = Path(path)
        if path.suffix == ".json":
            engine = engine_from_json(path)
        else:
            engine = PieceTokenizer.from_vocabulary(path).backend_tokenizer
        kwargs = {"clean_up_tokenization_spaces": cleans_up(engine)} | kwargs
        added = (ENDOFCHUNK, IMAGE, PADDING)
        engine.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
        return cls(tokenizer_object=engine, **kwargs)


class HfvlmFlamingoProcessor(ImageTextProcessor):
    """Texts with images among them. In a text, `<image>` stands for an image, and the text up to `<|endofchunk|>` is
    about that image."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or TEMPLATE, **kwargs)

    def count_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Count one placeholder for each image, whose tokens are no part of the text."""
        return [1] * len(image_sizes)

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
