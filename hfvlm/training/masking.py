"""Batches of which patches and words are hidden, for models that learn to tell them.

As FLAVA's authors make them: https://github.com/facebookresearch/multimodal at 3c2a85a, examples/flava/data.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvlm.checks.ranges import check_number
from hfvlm.media.rows import captions_of
from hfvlm.training.augmentation import RandomResizedCrop
from hfvlm.training.data import ContrastiveCollator

TRIES = 10
# What becomes of a word that is to be told: most are hidden, some become another, the rest stay as they are.
HIDDEN, REPLACED = 0.8, 0.1


class MaskingCollator(ContrastiveCollator):
    """Rows with pictures, texts or both to the inputs of a model that tells what is hidden of them, as
    `HfvlmFLAVAForPreTraining`.

    Patches are hidden in rectangles; of texts with pictures, whole words; of texts alone, pieces, each on its own.
    Some texts give way to another row's, and then do not belong to their pictures. What is drawn for a row depends on
    the seed, the row and the epoch alone, and is the same in each evaluation.

    Args:
        processor: of the model; its image processor draws the patches and makes what the codebook reads.
        columns: as `ContrastiveCollator`.
        strangers: a data set, of whose texts one takes a text's place; None leaves all texts with their pictures, and
            the model's matching untrained.
        itm_probability: how often.
        mlm_probability: share of pieces that are to be told.
        augment: as `ContrastiveCollator`. Of a `RandomResizedCrop` the image encoder and the codebook each read the
            same part at their own size.
        **options: of `ContrastiveCollator` and of the tokenizer; of texts alone, the original takes 512 tokens
            (`max_length`).
    """

    def __init__(
        self,
        processor: Any,
        columns: Mapping[str, str] | None = None,
        *,
        strangers: Any = None,
        itm_probability: float = 0.1,
        mlm_probability: float = 0.15,
        augment: Mapping[str, Callable[[Any, np.random.Generator], Any]] | None = None,
        **options: Any,
    ):
        check_number("itm_probability", itm_probability, 0, 1)
        check_number("mlm_probability", mlm_probability, 0, 1)
        changes = dict(augment or {})
        if isinstance(crop := changes.get("image"), RandomResizedCrop):
            changes["image"] = crop.cut
        defaults: dict[str, Any] = {"all_captions": False, "padding": "max_length"}
        super().__init__(processor, columns, augment=changes, **defaults | options)
        self.strangers, self.itm_probability, self.mlm_probability = strangers, itm_probability, mlm_probability

    def read(self, row: Mapping[str, Any], random: np.random.Generator | None) -> dict[str, Any]:
        """As `ContrastiveCollator`, and in training the seed of all else that is drawn for the row."""
        values = super().read(row, random)
        return values if random is None else values | {"seed": int(random.integers(2**63))}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Rows of `Rows` -> the model's inputs, and what `ContrastiveCollator` says about the rows."""
        randoms = [np.random.default_rng(row.get("seed", row["index"])) for row in rows]
        matched = None
        if self.strangers is not None and "image" in rows[0] and "text" in rows[0]:
            met = [self.meet(row, random) for row, random in zip(rows, randoms, strict=True)]
            rows, matched = [row for row, _ in met], torch.tensor([belongs for _, belongs in met])
        inputs = super().__call__(rows)
        if "image" in rows[0]:
            inputs |= self.hidden_patches(rows, randoms)
        if "text" in rows[0]:
            inputs |= self.hidden_words(inputs["input_ids"], randoms, whole="image" in rows[0])
        if matched is not None:
            inputs["itm_labels"] = matched.long()
        return inputs

    def meet(self, row: Mapping[str, Any], random: np.random.Generator) -> tuple[Mapping[str, Any], bool]:
        """The row, seldom with a stranger's text, and whether its text belongs to its picture."""
        if random.random() < self.itm_probability:
            for _ in range(TRIES):
                text = self.text_of(int(random.integers(len(self.strangers))), random)
                if text not in (None, *row["text"]):
                    return {**row, "text": [text]}, False
        return row, True

    def text_of(self, index: int, random: np.random.Generator) -> str | None:
        """One of a stranger's texts, if it has any."""
        stranger = self.strangers[index]
        try:
            texts = captions_of(stranger[self.columns_of(stranger)["text"]])
        except ValueError:
            return None
        return texts[int(random.integers(len(texts)))]

    def hidden_patches(
        self, rows: Sequence[Mapping[str, Any]], randoms: Sequence[np.random.Generator]
    ) -> dict[str, Tensor]:
        """What the codebook reads, and the masks. In training it reads the picture as it was cut out, in evaluation
        as it was squashed for the image encoder: so the original."""
        images = self.processor.image_processor
        settings = images.settings_for({})
        pictures = [images.fitted(row["image"], settings | {"do_resize": "seed" not in row}, "image") for row in rows]
        mask = images.patch_mask(settings)
        masks = np.stack([mask(Random(int(random.integers(2**63)))) for random in randoms])
        codebook = images.codebook_pixels(pictures, settings)
        return {"codebook_pixel_values": torch.from_numpy(codebook), "bool_masked_pos": torch.from_numpy(masks)}

    def hidden_words(
        self, input_ids: Tensor, randoms: Sequence[np.random.Generator], *, whole: bool
    ) -> dict[str, Tensor]:
        """`(B, N)` ids -> the same with some words hidden, and these as labels."""
        tokenizer = self.processor.tokenizer
        rows = []
        for ids, random in zip(input_ids.numpy(), randoms, strict=True):
            special = np.isin(ids, tokenizer.all_special_ids)
            if whole:
                chosen = draw_words(tokenizer.convert_ids_to_tokens(ids.tolist()), self.mlm_probability, random)
            else:
                chosen = random.random(len(ids)) < self.mlm_probability
            rows.append(hide_words(ids, chosen & ~special, tokenizer.mask_token_id, len(tokenizer), random))
        masked, labels = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        return {"input_ids_masked": masked, "mlm_labels": labels}


def whole_words(tokens: Sequence[str]) -> list[list[int]]:
    """Places of the pieces of each word, by the pieces' names; [CLS] and [SEP] are none."""
    words: list[list[int]] = []
    for i, token in enumerate(tokens):
        if token in ("[CLS]", "[SEP]"):
            continue
        if token.startswith("##") and words:
            words[-1].append(i)
        else:
            words.append([i])
    return words


def draw_words(tokens: Sequence[str], share: float, random: np.random.Generator, most: int = 512) -> np.ndarray:
    """Which pieces are to be told: whole words, up to a share of all pieces.

    As in the original, padding is drawn from like words, so that a short text loses its share on average.
    """
    count = min(most, max(1, round(len(tokens) * share)))
    drawn: list[int] = []
    words = whole_words(tokens)
    for i in random.permutation(len(words)):
        if len(drawn) + len(words[i]) <= count:
            drawn += words[i]
    chosen = np.zeros(len(tokens), dtype=bool)
    chosen[drawn] = True
    return chosen


def hide_words(
    ids: np.ndarray, chosen: np.ndarray, mask_token_id: int, vocab_size: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Ids `(N,)` and which of them are to be told -> the ids with most of these hidden, and the labels, -100 for the
    others (BERT, https://arxiv.org/abs/1810.04805, appendix A.1)."""
    labels = np.where(chosen, ids, -100)
    fate, others = random.random(len(ids)), random.integers(vocab_size, size=len(ids))
    masked = np.where(chosen & (fate < HIDDEN), mask_token_id, ids)
    return np.where(chosen & (fate >= HIDDEN) & (fate < HIDDEN + REPLACED), others, masked), labels
