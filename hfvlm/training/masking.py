"""Batches with masked patches and words, for models that learn to predict them.

Source: examples/flava/data of https://github.com/facebookresearch/multimodal at 3c2a85a.
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
# Of the words to predict, the shares that are masked and that are replaced by another; the rest stays as it is.
MASKED, REPLACED = 0.8, 0.1


class MaskingCollator(ContrastiveCollator):
    """Collator of rows with images, texts or both to the inputs of a model that predicts their masked parts, as
    `HfvlmFLAVAForPreTraining`.

    Patches are masked in rectangles; of texts with images, whole words; of texts without images, single pieces. Some
    texts are replaced by another row's, and then do not match their images. What is drawn for a row depends only on
    the seed, the row and the epoch, and is the same in each evaluation.

    Args:
        processor: of the model; its image processor draws the patches and prepares the codebook's inputs.
        columns: as `ContrastiveCollator`.
        strangers: a data set whose texts are negatives, which replace texts; None leaves all texts with their images,
            and the model's matching untrained.
        itm_probability: of a negative.
        mlm_probability: share of pieces to predict.
        augment: as `ContrastiveCollator`. Of a `RandomResizedCrop` the image encoder and the codebook each read the
            same part at their own size.
        **options: of `ContrastiveCollator` and of the tokenizer; of texts without images, the original takes 512
            tokens (`max_length`).
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
        self.negatives, self.itm_probability, self.mlm_probability = strangers, itm_probability, mlm_probability

    def read(self, row: Mapping[str, Any], random: np.random.Generator | None) -> dict[str, Any]:
        """Read a row as `ContrastiveCollator`; add, in training, the seed of all else that is drawn for it."""
        values = super().read(row, random)
        return values if random is None else values | {"seed": int(random.integers(2**63))}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows of `Rows` to the model's inputs, with the entries of `ContrastiveCollator` about the rows."""
        randoms = [np.random.default_rng(row.get("seed", row["index"])) for row in rows]
        matched = None
        if self.negatives is not None and "image" in rows[0] and "text" in rows[0]:
            drawn = [self.draw_text(row, random) for row, random in zip(rows, randoms, strict=True)]
            rows, matched = [row for row, _ in drawn], torch.tensor([matches for _, matches in drawn])
        inputs = super().__call__(rows)
        if "image" in rows[0]:
            inputs |= self.masked_patches(rows, randoms)
        if "text" in rows[0]:
            inputs |= self.masked_words(inputs["input_ids"], randoms, whole="image" in rows[0])
        if matched is not None:
            inputs["itm_labels"] = matched.long()
        return inputs

    def draw_text(self, row: Mapping[str, Any], random: np.random.Generator) -> tuple[Mapping[str, Any], bool]:
        """Replace the text of a row, with `itm_probability`, by a negative; return whether the text matches."""
        if random.random() < self.itm_probability:
            for _ in range(TRIES):
                text = self.negative_text(int(random.integers(len(self.negatives))), random)
                if text not in (None, *row["text"]):
                    return {**row, "text": [text]}, False
        return row, True

    def negative_text(self, index: int, random: np.random.Generator) -> str | None:
        """Draw one of the texts of a row of the negatives, if it has any."""
        row = self.negatives[index]
        try:
            texts = captions_of(row[self.columns_of(row)["text"]])
        except ValueError:
            return None
        return texts[int(random.integers(len(texts)))]

    def masked_patches(
        self, rows: Sequence[Mapping[str, Any]], randoms: Sequence[np.random.Generator]
    ) -> dict[str, Tensor]:
        """Return the codebook's inputs, and the masks. In training its inputs are the images as they were cropped, in
        evaluation as they were squashed for the image encoder: so the original."""
        processor = self.processor.image_processor
        settings = processor.settings_for({})
        images = [processor.fitted(row["image"], settings | {"do_resize": "seed" not in row}, "image") for row in rows]
        mask = processor.patch_mask(settings)
        masks = np.stack([mask(Random(int(random.integers(2**63)))) for random in randoms])
        codebook = processor.codebook_pixels(images, settings)
        return {"codebook_pixel_values": torch.from_numpy(codebook), "bool_masked_pos": torch.from_numpy(masks)}

    def masked_words(
        self, input_ids: Tensor, randoms: Sequence[np.random.Generator], *, whole: bool
    ) -> dict[str, Tensor]:
        """Return `(B, N)` ids with some words masked, and these as labels."""
        tokenizer = self.processor.tokenizer
        rows = []
        for ids, random in zip(input_ids.numpy(), randoms, strict=True):
            special = np.isin(ids, tokenizer.all_special_ids)
            if whole:
                chosen = draw_words(tokenizer.convert_ids_to_tokens(ids.tolist()), self.mlm_probability, random)
            else:
                chosen = random.random(len(ids)) < self.mlm_probability
            rows.append(mask_words(ids, chosen & ~special, tokenizer.mask_token_id, len(tokenizer), random))
        masked, labels = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        return {"input_ids_masked": masked, "mlm_labels": labels}


def whole_words(tokens: Sequence[str]) -> list[list[int]]:
    """Return the positions of the pieces of each word, by the pieces' names; [CLS] and [SEP] are none."""
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
    """Draw the pieces to predict: whole words, up to a share of all pieces; `(N,)`, bool.

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


def mask_words(
    ids: np.ndarray, chosen: np.ndarray, mask_token_id: int, vocab_size: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids `(N,)` with most of the chosen ones masked, and the labels, -100 for the others (BERT,
    https://arxiv.org/abs/1810.04805, appendix A.1)."""
    labels = np.where(chosen, ids, -100)
    fate, others = random.random(len(ids)), random.integers(vocab_size, size=len(ids))
    masked = np.where(chosen & (fate < MASKED), mask_token_id, ids)
    return np.where(chosen & (fate >= MASKED) & (fate < MASKED + REPLACED), others, masked), labels
