"""What BLIP-2 and InstructBLIP are fed (https://github.com/salesforce/LAVIS at 506965b)."""

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers.image_processing_base import BatchFeature

from hfvlm.media.images import read_images
from hfvlm.models.blip.processing_blip import HfvlmBLIPImageProcessor, HfvlmBLIPTokenizer
from hfvlm.processing.assembly import IGNORE, padded
from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.batches import is_empty, listed, texts_of
from hfvlm.processing.media_text import ImageTextProcessor
from hfvlm.processing.protection import Protected
from hfvlm.processing.settings import one_of, string, whole
from hfvlm.processing.tokenization import HfvlmTokenizer, PieceTokenizer
from hfvlm.processing.vocabularies import byte_pairs, sentencepiece, template


class HfvlmBLIP2ImageProcessor(HfvlmBLIPImageProcessor):
    """Pictures as BLIP-2 reads them: converted to RGB, then squashed to a square, bicubic."""

    size = {"height": 224, "width": 224}


class HfvlmBLIP2QFormerTokenizer(HfvlmBLIPTokenizer):
    """What the Q-Former reads: BERT's word pieces in lower case, and [DEC], which begins what is written."""

    MARKS = ("[DEC]",)

    def __init__(self, clean: str = "none", model_max_length: int = 32, **kwargs: Any):
        super().__init__(clean=clean, model_max_length=model_max_length, **kwargs)


class HfvlmBLIP2RetrievalProcessor(DualEncoderProcessor):
    """Pictures and texts as the first stage reads them: `processor(images=..., text=...)`, then `model(**inputs)`."""


class HfvlmBLIP2Tokenizer(HfvlmTokenizer):
    """The language model's own, with a token for the places of pictures and one for those of films."""

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __call__(
        self, text: Any = None, *args: Any, padding: Any = False, truncation: Any = False, **kwargs: Any
    ) -> Any:
        """As every tokenizer: nothing is padded or cut unless asked for."""
        return super().__call__(text, *args, padding=padding, truncation=truncation, **kwargs)

    @classmethod
    def from_vocabulary(
        cls, path: str | Path, *, kind: str = "opt", size: int | None = None, **kwargs: Any
    ) -> "HfvlmBLIP2Tokenizer":
        """From the language model's original file.

        Args:
            path: OPT's `vocab.json`, beside which is its `merges.txt`; T5's or LLaMA's sentencepiece `.model`; or a
                tokenizer.json.
            kind: "opt", "t5" or "llama".
            size: rows of the language model's table of words; what the vocabulary has fewer gets names, so that the
                places of pictures come after them.
            **kwargs: of the tokenizer.

        Raises:
            ValueError: the file is no such vocabulary, or has more pieces than the model.
        """
        engine, special = ENGINES[kind](Path(path))
        pieces = engine.get_vocab_size()
        if size is not None and pieces > size:
            raise ValueError(
                f"{path}: its {pieces} pieces are more than the model's {size} (text_config.vocab_size): this is the "
                "vocabulary of another model."
            )
        places = (*(f"<unused_{i}>" for i in range(pieces, size or pieces)), IMAGE, VIDEO)
        engine.add_special_tokens([AddedToken(token, normalized=False) for token in places])
        # T5 pads behind a text, which its decoder does not continue.
        defaults: dict[str, Any] = {"padding_side": "right" if kind == "t5" else "left"}
        # LAVIS's tokenizers of OPT and T5 take spaces before punctuation out; LLaMA's does not.
        defaults |= {"clean_up_tokenization_spaces": kind != "llama"}
        return cls(tokenizer_object=engine, **defaults | special | kwargs)


IMAGE, VIDEO = "<image>", "<video>"


def opt_engine(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """OPT begins every text with its end token."""
    engine = byte_pairs(path)
    engine.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "<pad>", "</s>", "<unk>")])
    engine.post_processor = template(engine, "</s>", "")
    return engine, {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}


def t5_engine(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """T5 ends every text."""
    return sentencepiece(path), {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def llama_engine(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """InstructBLIP makes Vicuna's end token its start token and its unknown one, and adds one for padding."""
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "[PAD]"}
    engine = PieceTokenizer.from_vocabulary(path, bos_token="</s>", added=["[PAD]"]).backend_tokenizer
    return engine, special


ENGINES = {"opt": opt_engine, "t5": t5_engine, "llama": llama_engine}
# Each picture of a message, then what is said about it; answers end in a period where the conversation goes on.
CHAT = (
    "{% for message in messages %}{% if message.content is string %}{% set text = message.content %}{% else %}"
    "{% set text %}{% for part in message.content %}"
    "{{ part.text if part.type == 'text' else '<' + part.type + '>' }}{% endfor %}{% endset %}{% endif %}"
    "{% set said = text | replace('<image>', '') | replace('<video>', '') | trim %}"
    "{{ '<image>' * text.count('<image>') + '<video>' * text.count('<video>') }}"
    "{% if message.role == 'assistant' %} {{ said }}{% if not loop.last %}. {% endif %}"
    "{% else %}{{ BEFORE + said + AFTER }}{% endif %}{% endfor %}"
)


def default_chat_template(question: str) -> str:
    """Turns in which a user's are put as `question`, with `{}` in the place of what is asked."""
    before, _, after = question.partition("{}")
    return CHAT.replace("BEFORE", json.dumps(before)).replace("AFTER", json.dumps(after))


class HfvlmBLIP2Processor(ImageTextProcessor):
    """Texts about pictures as the second stage reads them: the picture first, then the text.

    `processor(images=...)` asks for captions; in `processor(images=..., text=...)` each picture stands before its
    text, unless the texts say `<image>` themselves.

    Args:
        image_processor: of the pictures.
        tokenizer: of the texts.
        chat_template: by default each turn of the user's is put as `question`.
        num_queries: tokens of a picture, as in the model's configuration.
        prompt: what captions begin with.
        question: how a question is put, with `{}` in its place.
        kind: whose conventions the texts follow, "opt", "t5" or "llama".
    """

    kind: str
    num_queries: int
    prompt: str

    CHECKS = {"num_queries": whole(1, 2**16), "prompt": string, "question": string, "kind": one_of(*ENGINES)}

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

    def count_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        return [self.num_queries] * len(image_sizes)

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """As `ImageTextProcessor`; without texts, for captions of the pictures.

        Args:
            images: as there.
            text: likewise.
            videos: in place of pictures, a film for each text: lists of equally many frames, each of which is read as
                a picture.
            return_tensors: "pt", "np", or None for lists.
            **kwargs: as there.
        """
        if not is_empty(videos):
            return self.films(videos, text, return_tensors, **kwargs)
        images = self.batched(images)
        return super().__call__(images, self.placed(images, text), return_tensors, **kwargs)

    def films(self, videos: Any, text: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Films and what is asked about each -> the model's inputs; see `__call__`."""
        if text is None:
            raise ValueError(f"{type(self).__name__} needs a text for each video.")
        options, words = self.call_options(kwargs)
        reading = {"upright": self.image_processor.upright, "allow_urls": options.pop("allow_urls", False)}
        frames = [read_images(list(video), **reading) for video in listed(videos)]
        texts = texts_of(text)
        texts = [texts] if isinstance(texts, str) else texts
        padded = {name: words[name] for name in ("padding_side", "pad_to_multiple_of") if name in words}
        counts = [len(film) for film in frames]
        if len(set(counts)) != 1 or len(counts) != len(texts):
            raise ValueError(
                f"Each text needs a film, and all films equally many frames: {len(texts)} texts, {counts} frames."
            )
        place = self.tokenizer.convert_tokens_to_ids(VIDEO)
        before = [place] * counts[0] * self.num_queries
        rows = [before + self.text_ids(item.replace(VIDEO, "")) for item in texts]
        pixels = self.image_processor([frame for film in frames for frame in film], return_tensors="np", **options)
        pixels = pixels["pixel_values"].reshape(len(frames), counts[0], *pixels["pixel_values"].shape[1:])
        batch = self.tokenizer.pad({"input_ids": rows}, padding=True, **padded)
        return BatchFeature({**batch, "pixel_values_videos": pixels}, tensor_type=return_tensors)

    def placed(self, images: Any, text: Any) -> Any:
        """Texts with a place for their pictures: where they name none, before them; without texts, the prompt."""
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
        """A text to ids, with one `image_token_id` for each picture. Each piece between pictures is a text of its own,
        which follows on its picture: special tokens included."""
        first, *others = text.split(self.image_token)
        ids = self.text_ids(first, add_special_tokens=add_special_tokens) if first or not others else []
        for i, piece in enumerate(others):
            ids.append(self.image_token_id)
            if piece or i + 1 == len(others):
                ids += self.text_ids(piece, add_special_tokens=add_special_tokens)
        return ids

    def text_ids(self, text: str, **options: Any) -> list[int]:
        return list(self.tokenizer(text, **options)["input_ids"])

    def captions(self, images: Any, text: Sequence[str]) -> BatchFeature:
        """Pictures and their captions -> what the model is trained on, `labels` included."""
        return self.examples(images, [self.prompt] * len(text), text)

    def examples(self, images: Any, text: Sequence[str], answers: Sequence[str]) -> BatchFeature:
        """Pictures, what is asked about each, and what is to be answered -> what the model is trained on.

        Args:
            images: one for each text.
            text: what is given, without places for pictures.
            answers: what is to be predicted.
        """
        rows = [self.answered(given, answer) for given, answer in zip(text, answers, strict=True)]
        inputs = self(images, list(text))
        pictures = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        encoded, labels = ([row[i] for row in rows] for i in (0, 1))
        count = self.num_queries
        queries = [self.image_token_id] * count
        batch = self.tokenizer.pad(
            {"input_ids": [queries + ids for ids in encoded]}, padding_side="right", return_tensors="pt"
        )
        before = 0 if self.kind == "t5" else count
        return BatchFeature(
            {**batch, "labels": torch.tensor(padded([[IGNORE] * before + row for row in labels])), **pictures}
        )

    def answers(self, text: Sequence[str]) -> Tensor:
        """Answers -> `(A, M)` ids with -100 behind their end, for the model's `rank`."""
        return torch.tensor(padded([self.answer_ids(answer) for answer in text]))

    def answer_ids(self, answer: str) -> list[int]:
        """What is written after a text, with its end."""
        if self.kind == "t5":
            return self.text_ids(answer)
        return self.text_ids(f" {answer}\n" if self.kind == "opt" else answer + self.tokenizer.eos_token)[1:]

    def answered(self, text: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids that are read, and those that are to be predicted: in their places, or of T5 what its decoder writes."""
        text = text.rstrip(" ")
        given = self.text_ids(text)
        if self.kind == "t5":
            return given, self.answer_ids(answer)
        if self.kind == "opt":  # one text, whose end is a new line
            ids = self.text_ids(f"{text} {answer}\n" if text else f"{answer}\n")
            known = len(given) if text else 0
            return ids, [IGNORE] * known + ids[known:]
        written = self.answer_ids(answer)
        return given + written, [IGNORE] * len(given) + written

    def labelled(self, messages: Protected) -> tuple[list[int], list[int]]:
        """Put images first; the last message's answer is trained on.

        Raises:
            ValueError: the language model is a T5.
        """
        if self.kind == "t5":
            raise ValueError("A T5 writes beside what it reads: train it on `processor.examples(...)`.")
        *before, last = messages
        given, answer = self.render(before, add_generation_prompt=True), last["content"]
        if not isinstance(answer, str):
            answer = "".join(part["text"] for part in answer if part["type"] == "text")
        pictures = given.count(self.image_token)
        ids, labels = self.answered(given.replace(self.image_token, ""), answer)
        return [self.image_token_id] * pictures + ids, [IGNORE] * pictures + labels

    def batch_decode(self, sequences: Any, *args: Any, new_tokens_only: Any = None, **kwargs: Any) -> list[str]:
        """As transformers'; of T5, which does not repeat the prompt, all is new."""
        if new_tokens_only is not None and self.kind == "t5":
            new_tokens_only, kwargs = None, {"skip_special_tokens": True} | kwargs
        written = super().batch_decode(sequences, *args, new_tokens_only=new_tokens_only, **kwargs)
        return [text.strip() for text in written]


class HfvlmInstructBLIPProcessor(HfvlmBLIP2Processor):
    """The same, for a Q-Former that reads the texts, too.

    Args:
        qformer_tokenizer: of what the Q-Former reads; too long instructions lose their beginning.
        **kwargs: the others as above.
    """

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

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        images, text = self.batched(images), None if text is None else texts_of(text)
        inputs = super().__call__(images, text, videos, return_tensors, **kwargs)
        if "pixel_values" in inputs:
            inputs.update(self.instructions(self.placed(images, text), return_tensors))
        elif "pixel_values_videos" in inputs:
            texts = [text] if isinstance(text, str) else text
            inputs.update(self.instructions([self.image_token + item.replace(VIDEO, "") for item in texts]))
        return inputs

    def media_inputs(self, media: Sequence[Any], conversations: Sequence[Sequence[dict[str, Any]]]) -> BatchFeature:
        """With the instructions: of each conversation what stands before the first answer."""
        inputs = super().media_inputs(media, conversations)
        known = [self.protected(own) for own in conversations]
        asked = [list(takewhile(lambda message: message["role"] != "assistant", own)) for own in known]
        prompts = [self.render(messages, add_generation_prompt=True) for messages in asked]
        inputs.update(self.instructions(prompts))
        return inputs

    def instructions(self, text: Sequence[str], return_tensors: str | None = "pt") -> dict[str, Any]:
        """What the Q-Former reads about each picture."""
        pieces = [said for item in text for said in self.said_of_each(item)]
        encoded = self.qformer_tokenizer(pieces, return_tensors=return_tensors)
        return {f"qformer_{name}": encoded[name] for name in ("input_ids", "attention_mask")}

    def said_of_each(self, text: str) -> list[str]:
        """What is said of each picture of a text: what follows on it, or on the pictures behind it."""
        said = [""]
        for piece in reversed(text.split(self.image_token)[1:]):
            said.append(piece or said[-1])
        return said[:0:-1]
