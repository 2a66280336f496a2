"""What Flamingo is fed (https://github.com/mlfoundations/open_flamingo at 655f693: src/factory.py,
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
from hfvlm.processing.tokenization import HfvlmTokenizer, PieceTokenizer, cleans_up, engine_from_json

IMAGE, ENDOFCHUNK, PADDING = "<image>", "<|endofchunk|>", "<PAD>"
# What the authors evaluate with: the text of a picture up to where the answer begins.
TASKS = {
    "caption": f"{IMAGE}Output:",
    "vqa": f"{IMAGE}Question:{{question}} Short answer:",
    "classify": f"{IMAGE}Output:",
    "hateful_memes": f"{IMAGE}is an image with: '{{text}}' written on it. Is it hateful? Answer:",
}
# A picture's text and what is answered, as often as there are examples.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}<|endofchunk|>{% endif %}"
    "{% endfor %}"
)


class HfvlmFlamingoImageProcessor(HfvlmCLIPImageProcessor):
    """Pictures as the CLIP inside was trained on them."""


class HfvlmFlamingoTokenizer(HfvlmTokenizer):
    """The language model's own, with tokens for the places of pictures, the ends of their texts, and padding."""

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, *args: Any, **kwargs: Any):
        tokens = {"eos_token": ENDOFCHUNK, "pad_token": PADDING, "padding_side": "left"}
        super().__init__(*args, **tokens | kwargs)

    def __call__(
        self, text: Any = None, *args: Any, padding: Any = False, truncation: Any = False, **kwargs: Any
    ) -> Any:
        """As every tokenizer: nothing is padded or cut unless asked for."""
        return super().__call__(text, *args, padding=padding, truncation=truncation, **kwargs)

    @classmethod
    def from_vocabulary(cls, path: str | Path, **kwargs: Any) -> "HfvlmFlamingoTokenizer":
        """From the language model's tokenizer.json, or LLaMA's tokenizer.model; what a vocabulary lacks of the three
        tokens gets the next ids.

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
    """Texts with pictures among them. In a text, `<image>` stands for a picture, and what follows it up to
    `<|endofchunk|>` is about that picture."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or TEMPLATE, **kwargs)

    def count_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        """One: what a picture shows does not stand in the text."""
        return [1] * len(image_sizes)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A text to ids, in one piece."""
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def few_shot(self, task: str, shots: Sequence[Mapping[str, str]] = (), **query: str) -> str:
        """A prompt as the authors evaluate with: some examples, and what is asked.

        `processor.few_shot("vqa", [{"question": "What is it?", "answer": "a cat"}], question="How many?")`; each
        example and the query have a picture, in this order.

        Args:
            task: "caption", "vqa", "classify" or "hateful_memes"; or a text of one's own with `<image>` and, in
                braces, names of what differs.
            shots: of each example what the task names ("question", "text"), and its "answer". Special tokens in these
                are words, as in messages.
            **query: what the task names.

        Raises:
            ValueError: something that the task names is missing.
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
        """`(B, N)` token ids -> what the authors train on, -100 elsewhere: never padding or a picture's place.

        Args:
            interleaved: of pages with pictures among their texts, only what is about a picture: from its place up to
                `<|endofchunk|>`. False takes all of it, as with one caption a picture.
        """
        place = input_ids == self.image_token_id
        left_out = place | (input_ids == self.tokenizer.pad_token_id)
        if interleaved:
            left_out |= ~self.about_pictures(input_ids)
        return input_ids.masked_fill(left_out, IGNORE)

    def about_pictures(self, input_ids: Tensor) -> Tensor:
        """`(B, N)` -> True from a picture's place up to the end of what is said of it, which counts."""
        numbers = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        ends = input_ids == self.tokenizer.convert_tokens_to_ids(ENDOFCHUNK)
        last_place = ((input_ids == self.image_token_id) * numbers).cummax(dim=1).values
        # Of the ends that stand before a token.
        last_end = (ends * numbers).cummax(dim=1).values.roll(1, dims=1)
        last_end[:, 0] = 0
        return last_place > last_end
