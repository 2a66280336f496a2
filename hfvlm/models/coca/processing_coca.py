"""CoCa's inputs (https://github.com/mlfoundations/open_clip at 89fb801)."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.image_processing_base import BatchFeature

from hfvlm.models.clip.processing_clip import HfvlmCLIPImageProcessor
from hfvlm.processing.base import DualEncoderProcessor
from hfvlm.processing.tokenization import ZeroPaddedTokenizer
from hfvlm.processing.vocabularies import OPENAI_TOKENS, openai_bpe


class HfvlmCoCaImageProcessor(HfvlmCLIPImageProcessor):
    """Images as CLIP's: short edge to 224 px, bicubic, centre crop."""


class HfvlmCoCaTokenizer(ZeroPaddedTokenizer):
    """OpenAI's byte-pair encoding, in lower case, with start and end.

    `from_vocabulary` reads `bpe_simple_vocab_16e6.txt.gz`, as released with the weights, or transformers'
    tokenizer.json.
    """

    DEFAULTS = {"clean": "lower", "model_max_length": 76, **OPENAI_TOKENS}
    engine_of = staticmethod(openai_bpe)

    def capped(self, max_length: int | None) -> int:
        """Return a length as it is given: what is too long for the decoder is its error."""
        return max_length or self.model_max_length

    def decodable(self, token_ids: Any, *, skip: bool) -> Any:
        """Drop the ids before the start token and after the end token, padding included."""
        ids = token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if not skip or isinstance(ids, int):
            return ids
        if ids and not isinstance(ids[0], int):
            return [self.decodable(row, skip=skip) for row in ids]
        return without_padding(list(ids), self.bos_token_id, self.eos_token_id)


class HfvlmCoCaProcessor(DualEncoderProcessor):
    """Images and texts to CoCa's inputs: `processor(images=..., text=...)`, then `model(**inputs)`."""

    def captions(self, images: Any, text: Sequence[str], prompts: Sequence[str] | None = None) -> BatchFeature:
        """Prepare images and their captions -> the model's inputs for training, `labels` included.

        Args:
            images: one for each caption.
            text: the captions; or answers, where there are prompts.
            prompts: texts that each text continues, as questions; inputs only, never predicted.
        """
        whole = text if prompts is None else [f"{prompt} {rest}" for prompt, rest in zip(prompts, text, strict=True)]
        inputs = self(images, whole)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for row, ids in zip(labels, self.prompt_ids(prompts or []), strict=prompts is not None):
            row[: len(ids)] = -100
        inputs["labels"] = labels
        return inputs

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Encode prompts to ids, each with the start token and without the end token."""
        return [ids[:-1] for ids in self.tokenizer(list(prompts), padding=False)["input_ids"]] if prompts else []

    def decode_captions(self, ids: Any, prompts: Sequence[str] | None = None) -> list[str]:
        """Decode the ids of `generate` -> captions; or answers, without the prompts that they continue."""
        texts = [text.strip() for text in self.batch_decode(ids, skip_special_tokens=True)]
        begun = [text.strip() for text in self.batch_decode(self.prompt_ids(prompts or []), skip_special_tokens=True)]
        each = len(texts) // len(begun) if begun else 0
        return [text.removeprefix(begun[i // each]).strip() for i, text in enumerate(texts)] if each else texts


def without_padding(ids: list[int], start: int | None, end: int | None) -> list[int]:
    """Return ids from the first start token, if there is one, to the first end token after it."""
    first = ids.index(start) if start in ids else 0
    return ids[first : ids.index(end, first)] if end in ids[first:] else ids[first:]
