"""Examples of ViLBERT's pretraining: captions and regions, some words and regions of which are masked.

Source: https://github.com/facebookresearch/vilbert-multi-task at f22b84a, vilbert/datasets/concept_cap_dataset.py.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch

from hfvlm.models.vilbert.processing_vilbert import HfvlmViLBERTProcessor, padded_texts
from hfvlm.models.vilbert.regions import Regions, overlaps

# Shares of words and of regions that are predicted; of these words that become [MASK] and another one; of these
# regions that lose their features.
PREDICTED, MASKED, REPLACED, ZEROED = 0.15, 0.8, 0.1, 0.9
# A region that overlaps a predicted one by more does not count in the mean's denominator.
OVERLAPPING = 0.4


def masked_example(
    processor: HfvlmViLBERTProcessor,
    caption: str,
    regions: Regions,
    *,
    others: Sequence[str] = (),
    text_length: int = 36,
    most_regions: int = 36,
    features_as_targets: bool = False,
    mask: bool = True,
) -> dict[str, torch.Tensor]:
    """Prepare a caption and an image's regions, by draws of `random` and, of words that replace others,
    `numpy.random`.

    The original needs exactly 36 regions; any number is padded here. It takes the global feature as the sum of the
    features that are left over the number of regions that do not overlap a predicted one, and so does this.

    Args:
        processor: the processor.
        caption: of the image.
        regions: of the image, with `probabilities` unless features are the targets.
        others: captions of which one takes the caption's place in half of the examples; without any, none does.
        text_length: that texts are cut and padded to.
        most_regions: that regions are cut and padded to, without their mean.
        features_as_targets: of "mse" and "nce".
        mask: predict words and regions; without it, all are shown.

    Returns:
        the inputs of `HfvlmViLBERTForPreTraining`, one row.
    """
    replaced = bool(others) and random.random() > 0.5
    if replaced:
        caption = others[random.randint(0, len(others) - 1)]
    tokenizer = processor.tokenizer
    ids = tokenizer.pieces(caption)[: text_length - 2]
    labels = mask_words(ids, tokenizer.mask_token_id, len(tokenizer)) if mask else [-1] * len(ids)
    text = padded_texts([processor.joined(ids)], text_length, tokenizer.pad_token_id)
    padding = [-1] * (text_length - len(labels) - 1)
    processor.region_rows(regions)  # checks the features
    features, targets = regions.features[:most_regions].copy(), regions.probabilities
    if features_as_targets:
        targets = regions.features
    if targets is None:
        raise ValueError("regions have no probabilities of classes, the targets of masked regions.")
    predicted, near = mask_regions(features, regions.boxes[:most_regions]) if mask else nothing_masked(len(features))
    kept, width = len(features), targets.shape[1]
    rows = {"features": (features, features.shape[1]), "targets": (targets[:most_regions], width)}
    padded = {name: np.zeros((most_regions, size), dtype=np.float32) for name, (_, size) in rows.items()}
    for name, (values, _) in rows.items():
        padded[name][:kept] = values
    locations, present = np.zeros((most_regions, 5), dtype=np.float32), np.zeros(most_regions, dtype=np.int64)
    locations[:kept], present[:kept] = regions.locations[:most_regions], 1
    mean = padded["features"].sum(axis=0, keepdims=True) / max(int((present[:kept] * ~near).sum()), 1)
    region_labels = np.full(most_regions, -1, dtype=np.int64)
    region_labels[:kept] = np.where(predicted, 1, -1)
    return {
        **text,
        "mlm_labels": torch.tensor([[-1, *labels, *padding]]),
        "alignment_labels": torch.tensor([int(replaced)]),
        "region_features": torch.from_numpy(np.concatenate([mean, padded["features"]])).float().unsqueeze(0),
        "region_locations": torch.from_numpy(np.concatenate([[[0, 0, 1, 1, 1]], locations])).float().unsqueeze(0),
        "region_mask": torch.from_numpy(np.concatenate([[1], present])).unsqueeze(0),
        "region_labels": torch.from_numpy(region_labels).unsqueeze(0),
        "region_targets": torch.from_numpy(padded["targets"]).unsqueeze(0),
    }


def mask_words(ids: list[int], mask: int, vocabulary: int) -> list[int]:
    """Mask some words of a text in place, by `random` -> their ids, -1 for the others."""
    labels = []
    for i, word in enumerate(ids):
        drawn = random.random() / PREDICTED
        labels.append(word if drawn < 1 else -1)
        if drawn < MASKED:
            ids[i] = mask
        elif drawn < MASKED + REPLACED:
            ids[i] = int(np.random.randint(vocabulary))
    return labels


def mask_regions(features: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take the features of some regions `(n, F)` away in place, by `random` -> which regions are predicted, `(n,)`,
    and which overlap one of these, `(n,)`."""
    predicted = np.zeros(len(features), dtype=bool)
    for i in range(len(features)):
        drawn = random.random() / PREDICTED
        predicted[i] = drawn < 1
        if drawn < ZEROED:
            features[i] = 0
    near = overlaps(boxes, boxes)[predicted] > OVERLAPPING
    return predicted, np.asarray(near.any(axis=0))


def nothing_masked(regions: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(regions, dtype=bool), np.zeros(regions, dtype=bool)
