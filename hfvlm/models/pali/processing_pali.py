"""PaLI's inputs, and the boxes in its answers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from tokenizers import AddedToken
from transformers.image_processing_base import BatchFeature

from hfvlm.models.paligemma.processing_paligemma import HfvlmPaliGemmaImageProcessor
from hfvlm.processing.assembly import IGNORE, expand, padded
from hfvlm.processing.grounding import Region
from hfvlm.processing.image_patches import ImagesFirstProcessor, box_in_pixels
from hfvlm.processing.protection import Protected
from hfvlm.processing.settings import whole
from hfvlm.processing.tokenization import HfvlmTokenizer
from hfvlm.processing.vocabularies import add_placeholders, sentencepiece

# mT5's tokens for spans that are left out; the first has the last id.
SENTINELS = tuple(f"<extra_id_{i}>" for i in reversed(range(100)))
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] != 'user' or not loop.first -%}"
    "{{- raise_exception('PaLI reads one message of the user; its answer is no part of the text.') -}}{%- endif -%}"
    "{%- set content = message['content'] -%}"
    "{%- if content is string -%}{{- content -}}{%- else -%}"
    "{{- '<image>' * (content | selectattr('type', 'equalto', 'image') | list | length) -}}"
    "{{- content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -}}"
    "{%- endif -%}{%- endfor -%}"
)
BOX = re.compile(r"(?<!\d)(\d{1,4}) (\d{1,4}) (\d{1,4}) (\d{1,4})(?!\d)\s*([^;]*)")


class HfvlmPaLIImageProcessor(HfvlmPaliGemmaImageProcessor):
    """Images squashed to a square, bilinear, in floating point."""


class HfvlmPaLITokenizer(HfvlmTokenizer):
    """mT5's sentencepiece, its sentinels, and a placeholder for images. Texts end with </s>; nothing is padded or cut
    by default."""

    DEFAULTS = {"padding_side": "right"}
    default_padding = False
    default_truncation = False

    @classmethod
    def from_vocabulary(cls, path: str | Path, *, size: int | None = None, **kwargs: Any) -> "HfvlmPaLITokenizer":
        """Make a tokenizer from mT5's `spiece.model` or a tokenizer.json.

        Args:
            path: the file.
            size: rows of the embedding table; those beyond the vocabulary get names, so that the placeholder comes
                after them.
            **kwargs: of the tokenizer.

        Raises:
            VocabularyError: the file is no such vocabulary, or has more pieces than `size`.
        """
        engine = sentencepiece(path)
        if engine.token_to_id(SENTINELS[-1]) is None:
            engine.add_special_tokens([AddedToken(token, normalized=False) for token in SENTINELS])
        add_placeholders(engine, path, size, "<image>")
        special = {"pad_token": engine.id_to_token(0), "eos_token": engine.id_to_token(1)}
        return cls(tokenizer_object=engine, **special | {"unk_token": engine.id_to_token(2)} | kwargs)


class HfvlmPaLIProcessor(ImagesFirstProcessor):
    """Texts about images for the encoder, and answers for the decoder.

    A text is `<image>Generate the alt_text in EN at 0: <extra_id_0>`; see `hfvlm.training.mixture` for the paper's
    tasks. Boxes are top, left, bottom and right in thousandths of the image, as words, and their name: "153 102 972
    716 cat ; ...".

    Args:
        image_processor: of the images.
        tokenizer: of the texts.
        chat_template: by default one for a message.
        patch_size: of the ViT, in pixels.
        bins: steps of a coordinate.
    """

    caption = "Generate the alt_text in EN at 0: <extra_id_0>"
    system = "PaLI"
    bins: Annotated[int, whole(2, 9999)]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        patch_size: int = 14,
        bins: int = 1000,
        **kwargs: Any,
    ):
        self.set_arguments(patch_size=patch_size, bins=bins)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or TEMPLATE, **kwargs)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode a text: a placeholder for each image, the words and </s>.

        Raises:
            ValueError: an image comes after words.
        """
        images, words = self.divided(text)
        ids = self.tokenizer(words, add_special_tokens=add_special_tokens, padding=False)["input_ids"]
        return [*[self.image_token_id] * images, *ids]

    def labelled(self, messages: Protected) -> tuple[list[int], list[int]]:
        raise ValueError(
            "An encoder-decoder's labels are not aligned with its text: give `suffix` to the processor's call, or "
            "use `hfvlm.training.mixture.MixtureCollator`."
        )

    def __call__(self, images: Any = None, text: Any = None, *, suffix: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare texts and their images as inputs of the model, padded where there are several.

        Args:
            images: one image, a list, or a list of lists, one for each text; see `hfvlm.media.read_image`.
            text: one text or a list, which begins with `image_token` for each of its images; by default the prompt of
                an English caption for each image.
            suffix: the answer to each text, to train on: the inputs have `labels`.
            **kwargs: see `ImageTextProcessor`.

        Raises:
            ValueError: texts, answers and images do not fit each other, or a row does not fit `max_length`.
        """
        tensors = kwargs.get("return_tensors", "pt")
        inputs = super().__call__(images, self.asking(images, text), **kwargs)
        if suffix is None:
            return inputs
        answers = self.answers_to(len(inputs["input_ids"]), suffix)
        labels = padded([self.answer_ids(answer) for answer in answers])
        return BatchFeature({**inputs, "labels": labels}, tensor_type=tensors)

    def answer_ids(self, answer: str) -> list[int]:
        """Encode an answer as the decoder generates it, with its end."""
        return list(self.tokenizer(answer, padding=False)["input_ids"])

    @property
    def sentinels(self) -> list[int]:
        """The ids of <extra_id_0>, <extra_id_1> and so on."""
        return list(self.tokenizer.convert_tokens_to_ids(list(reversed(SENTINELS))))

    def training_batch(self, examples: Sequence[tuple[Any, list[int], list[int]]]) -> dict[str, Any]:
        """Make the model's inputs of images, encoder's ids with one placeholder for an image, and labels.

        Args:
            examples: of each row its image, read, or None; its ids; and its labels.
        """
        (count,) = self.count_tokens([(1, 1)])
        rows = [expand(ids, ids, self.image_token_id, [count]) for _, ids, _ in examples]
        batch = dict(self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt"))
        batch["labels"] = torch.tensor(padded([labels for _, _, labels in examples]))
        if images := [image for image, _, _ in examples if image is not None]:
            batch |= self.image_processor(images, return_tensors="pt")
        return batch

    def batch_decode(self, sequences: Any, *args: Any, new_tokens_only: Any = None, **kwargs: Any) -> Any:
        """Decode as transformers does; the decoder does not repeat the text, so that all tokens are new."""
        if new_tokens_only is not None:
            kwargs = {"skip_special_tokens": True} | kwargs
        sequences = [[i for i in map(int, row) if i != IGNORE] for row in sequences]
        return super().batch_decode(sequences, *args, **kwargs)

    # Boxes

    def regions(self, text: str, size: tuple[int, int]) -> list[Region]:
        found: list[Region] = []
        for *numbers, name in BOX.findall(text):
            top, left, bottom, right = shares = [int(number) / (self.bins - 1) for number in numbers]
            if max(shares) <= 1 and bottom > top and right > left:
                found.append({"label": name.strip() or None, "box_xyxy": box_in_pixels(shares, size)})
        return found

    def box_text(self, shares: Sequence[float]) -> str:
        return " ".join(str(round(min(max(share, 0), 1) * (self.bins - 1))) for share in shares)

    def locating(self, expression: str) -> str:
        return f"{self.asked(f'detect {expression}')} {SENTINELS[-1]}"
