"""The conventions of BLIP-2's and InstructBLIP's language models: vocabularies, and how answers follow prompts
(https://github.com/salesforce/LAVIS at 506965b)."""

from pathlib import Path
from typing import Any, ClassVar

from tokenizers import AddedToken, Tokenizer

from hfvlm.processing.assembly import IGNORE
from hfvlm.processing.tokenization import PieceTokenizer
from hfvlm.processing.vocabularies import byte_pairs, sentencepiece, template


class Vicuna:
    """A decoder whose answers are texts of their own, which end in its end token."""

    tokenizer_defaults: ClassVar[dict[str, Any]] = {"padding_side": "left", "clean_up_tokenization_spaces": False}

    def engine(self, path: Path) -> tuple[Tokenizer, dict[str, str]]:
        """Make the tokenizer's engine and its special tokens from the original file.

        InstructBLIP uses Vicuna's end token as the start and the unknown one, too, and adds one for padding.
        """
        special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "[PAD]"}
        engine = PieceTokenizer.from_vocabulary(path, bos_token="</s>", added=["[PAD]"]).backend_tokenizer
        return engine, special

    def answer(self, processor: Any, answer: str) -> list[int]:
        """Encode what follows a prompt, with its end."""
        return processor.text_ids(answer + processor.tokenizer.eos_token)[1:]

    def example(self, processor: Any, text: str, answer: str) -> tuple[list[int], list[int]]:
        """Encode a prompt and its answer -> ids that are inputs, and labels."""
        given, predicted = processor.text_ids(text), processor.answer_ids(answer)
        return given + predicted, [IGNORE] * len(given) + predicted

    def labels(self, images: int, labels: list[int]) -> list[int]:
        """Make the labels of a row whose inputs begin with placeholders of images."""
        return [IGNORE] * images + labels

    def check_conversations(self) -> None:
        """Refuse to train on conversations where labels are no inputs."""

    def decoding(self, new_tokens_only: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the options by which generated ids are decoded, given those of a call."""
        return new_tokens_only, options


class OPT(Vicuna):
    """A decoder of prompt and answer as one text, whose end is a new line."""

    # LAVIS's tokenizers of OPT and T5 take spaces before punctuation out.
    tokenizer_defaults = {"padding_side": "left", "clean_up_tokenization_spaces": True}

    def engine(self, path: Path) -> tuple[Tokenizer, dict[str, str]]:
        """Make OPT's, which begins every text with its end token."""
        engine = byte_pairs(path)
        engine.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "<pad>", "</s>", "<unk>")])
        engine.post_processor = template(engine, "</s>", "")
        return engine, {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}

    def answer(self, processor: Any, answer: str) -> list[int]:
        return processor.text_ids(f" {answer}\n")[1:]

    def example(self, processor: Any, text: str, answer: str) -> tuple[list[int], list[int]]:
        ids = processor.text_ids(f"{text} {answer}\n" if text else f"{answer}\n")
        known = len(processor.text_ids(text)) if text else 0
        return ids, [IGNORE] * known + ids[known:]


class T5(Vicuna):
    """An encoder of prompts and a decoder of answers."""

    # It pads after a text, which its decoder does not continue.
    tokenizer_defaults = {"padding_side": "right", "clean_up_tokenization_spaces": True}

    def engine(self, path: Path) -> tuple[Tokenizer, dict[str, str]]:
        """Make T5's, which ends every text."""
        return sentencepiece(path), {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

    def answer(self, processor: Any, answer: str) -> list[int]:
        return processor.text_ids(answer)

    def example(self, processor: Any, text: str, answer: str) -> tuple[list[int], list[int]]:
        return processor.text_ids(text), processor.answer_ids(answer)

    def labels(self, images: int, labels: list[int]) -> list[int]:
        return labels

    def check_conversations(self) -> None:
        """Raise a ValueError."""
        raise ValueError("A T5 generates apart from its inputs: train it on `processor.examples(...)`.")

    def decoding(self, new_tokens_only: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Take all ids for new: generated texts do not begin with the prompt."""
        return (None, {"skip_special_tokens": True} | options) if new_tokens_only is not None else (None, options)


LANGUAGES: dict[str, Vicuna] = {"opt": OPT(), "t5": T5(), "llama": Vicuna()}
