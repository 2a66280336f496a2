"""Instances as colours of where they are, and back (baaivision/Painter at cfec845, data/mmdet_custom,
eval/coco_panoptic, util/matrix_nms.py).

Of 80 by 80 places, red says which of 4 by 4 large cells, green and blue which of 20 by 20 small ones in it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.models.painter.codes import pixels_of

LARGE, SMALL = 4, 20
EDGE = LARGE * SMALL
# Colours that an image is compared with at a time.
COLORS = 64
# Candidates that the suppression takes.
CANDIDATES = 2000


@dataclass
class Instances:
    """What was found in an image, the best first.

    Args:
        masks: `(N, H, W)`, bool.
        scores: `(N,)`, of 0 to 1.
        classes: `(N,)`, int64; 1 for all of those that have no class yet.
    """

    masks: Tensor
    scores: Tensor
    classes: Tensor


def places() -> np.ndarray:
    """Return the places in the order of their colours, `(6400, 4)`: column and row of the large cell, then of the
    small one."""
    large_y, large_x, small_y, small_x = np.unravel_index(np.arange(EDGE**2), (LARGE, LARGE, SMALL, SMALL))
    return np.stack([large_x, large_y, small_x, small_y], axis=1)


def place_colors() -> np.ndarray:
    """Return the colours of the places, `(6400, 3)`, uint8."""
    large_x, large_y, small_x, small_y = places().T
    step = 256 // SMALL + 1
    red = 255 - (255 // LARGE**2) * (LARGE * large_y + large_x)
    return np.stack([red, 255 - step * small_y, 255 - step * small_x], axis=1).astype(np.uint8)


def encode_instances(masks: Any, boxes: Any = None) -> np.ndarray:
    """Paint masks `(N, H, W)`, each in the colour of its centre of mass -> `(H, W, 3)`, uint8.

    Args:
        masks: nonzero where an instance is; the last one is on top.
        boxes: `(N, 4)` as left, top, right, bottom in pixels: paint by their centres instead.

    Raises:
        ValueError: the shapes are others, a mask is empty, or a centre is outside of the image.
    """
    masks = np.asarray(masks).astype(bool)
    if masks.ndim != 3:
        raise ValueError(f"Masks are (N, H, W), not {masks.shape}.")
    height, width = masks.shape[1:]
    centres = centres_of(masks) if boxes is None else (np.asarray(boxes)[:, :2] + np.asarray(boxes)[:, 2:]) / 2
    if len(centres) != len(masks):
        raise ValueError(f"{len(masks)} masks need as many boxes, not {len(centres)}.")
    image, colors = np.zeros((height, width, 3), np.uint8), place_colors()
    for mask, (x, y) in zip(masks, centres, strict=True):
        column, row = int(x / width * (EDGE - 1)), int(y / height * (EDGE - 1))
        if not (0 <= column < EDGE and 0 <= row < EDGE):
            raise ValueError(f"The centre ({x:g}, {y:g}) is outside of an image of {width} x {height}.")
        cells = (row // SMALL, column // SMALL, row % SMALL, column % SMALL)
        image[mask] = colors[np.ravel_multi_index(cells, (LARGE, LARGE, SMALL, SMALL))]
    return image


def centres_of(masks: np.ndarray) -> list[tuple[float, float]]:
    """Return the centre of mass of each mask, as x and y."""
    if any(not mask.any() for mask in masks):
        raise ValueError("An empty mask has no centre: leave it out.")
    grids = (mask.nonzero() for mask in masks)
    return [(float(columns.mean()), float(rows.mean())) for rows, columns in grids]


def candidates(image: Any, threshold: float = 18.0) -> Instances:
    """Return, for each colour of a place, the pixels of an image `(H, W, 3)` that are near it, the nearest first and
    at most `CANDIDATES`; without any, one empty mask of score 0.

    Args:
        image: as painted, in 0..255.
        threshold: mean difference over the channels, below which a pixel is near. With 18, the original's, any colour
            is near some, black among them.
    """
    check_number("threshold", threshold, 0, 765, open_low=True)
    pixels, colors = pixels_of(image), torch.from_numpy(place_colors()).float()
    means = torch.cat([near(pixels, part, threshold)[1] for part in colors.split(COLORS)])
    found = means.isfinite()
    if not found.any():
        return Instances(torch.zeros(1, *pixels.shape[:2], dtype=torch.bool), torch.zeros(1), torch.zeros(1).long())
    means, order = torch.sort(means[found])
    means, colors = means[:CANDIDATES], colors[found][order[:CANDIDATES]]
    masks = torch.cat([near(pixels, part, threshold)[0] for part in colors.split(COLORS)])
    return Instances(masks, scores_of(means), torch.ones(len(masks)).long())


def near(pixels: Tensor, colors: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the masks `(N, H, W)` of the pixels near each colour, and their mean differences `(N,)`, NaN for none."""
    distance = (pixels - colors[:, None, None]).abs().sum(dim=-1) / 3.0
    mask = distance < threshold
    return mask, (distance * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))


def scores_of(means: Tensor) -> Tensor:
    """Turn mean differences into scores: the worst, if it is 1 or more, has 0."""
    return 1 - means / means.max().clamp_min(1.0)


def decode_instances(image: Any, distances: Any = None, *, threshold: float = 18.0, most: int = 100) -> Instances:
    """Find the instances in a painted image `(H, W, 3)`, by matrix NMS over `candidates`.

    Args:
        image: as painted, in 0..255.
        distances: `(H, W, classes)`, of the same image painted by its classes, from `class_distances`: instances get
            the best of the first 80 classes, COCO's things, and suppress only others of theirs.
        threshold: see `candidates`.
        most: instances that are kept.
    """
    check_integer("most", most)
    found = candidates(image, threshold)
    if not found.masks.any():
        return found
    if distances is not None:
        found.classes = vote(found.masks, distances)
    scores, classes, masks, _ = matrix_nms(found.masks, found.classes, found.scores, most=most)
    return Instances(masks, scores, classes)


def decode_nearest(image: Any) -> tuple[Instances, Tensor, Tensor]:
    """Give each pixel of a painted image `(H, W, 3)` to the nearest colour, black among them: a map without overlaps.

    Returns:
        Instances in the order of their colours, of class 0 for black and 1 for others; the colours' indices `(H, W)`;
        and the sums of the differences to them `(H, W)`.
    """
    pixels = pixels_of(image)
    colors = torch.cat([torch.from_numpy(place_colors()).float(), torch.zeros(1, 3)])
    rows = [(row.unsqueeze(1) - colors).abs().sum(dim=-1).min(dim=-1) for row in pixels]
    nearest, distance = torch.stack([row.indices for row in rows]), torch.stack([row.values for row in rows])
    kinds = nearest.unique()
    masks = nearest == kinds[:, None, None]
    means = torch.stack([distance[mask].mean() for mask in masks])
    return Instances(masks, scores_of(means), (kinds < EDGE**2).long()), nearest, distance


def vote(masks: Tensor, distances: Any, things: int = 80) -> Tensor:
    """Choose a class for each mask `(N, H, W)`: the one of the first `things` to which, by `class_distances`
    `(H, W, classes)`, the sum of its pixels is nearest."""
    distances = torch.as_tensor(distances)[..., :things]
    if distances.shape[:2] != masks.shape[1:]:
        raise ValueError(f"Masks are {tuple(masks.shape[1:])}, the map of classes {tuple(distances.shape[:2])}.")
    likeness = 1.0 - distances / distances.max()
    return torch.einsum("nhw,hwk->nk", masks.float(), likeness).softmax(dim=-1).argmax(dim=-1)


def matrix_nms(
    masks: Tensor,
    classes: Tensor,
    scores: Tensor,
    *,
    kernel: str = "gaussian",
    sigma: float = 2.0,
    least: float = -1.0,
    before: int = -1,
    most: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lower the scores of masks that overlap with better ones of their class (SOLOv2,
    https://arxiv.org/abs/2003.10152).

    Args:
        masks: `(N, H, W)`.
        classes: `(N,)`.
        scores: `(N,)`.
        kernel: "gaussian" or "linear".
        sigma: of the gaussian: the overlap is squared and multiplied by it.
        least: score that is kept, afterwards; with no more than 0, all are.
        before: how many of the best are taken; with -1, all are.
        most: how many of the best are kept; with -1, all are.

    Returns:
        Scores, classes and masks, the best first, and their indices among those given.

    Raises:
        ValueError: there is no such kernel, or there are not as many of each.
    """
    if kernel not in ("gaussian", "linear"):
        raise ValueError(f"kernel {kernel!r} is none of gaussian, linear.")
    if not len(masks) == len(classes) == len(scores):
        raise ValueError(f"{len(masks)} masks, {len(classes)} classes and {len(scores)} scores belong together.")
    if not len(masks):
        return scores, classes, masks, classes.new_zeros(0, dtype=torch.long)
    scores, kept = torch.sort(scores, descending=True)
    if before > 0:
        scores, kept = scores[:before], kept[:before]
    scores = scores * decay(masks[kept], classes[kept], kernel, sigma)
    if least > 0:
        enough = scores >= least
        scores, kept = scores[enough], kept[enough]
    scores, order = torch.sort(scores, descending=True)
    if most > 0:
        scores, order = scores[:most], order[:most]
    kept = kept[order]
    return scores, classes[kept], masks[kept], kept


def decay(masks: Tensor, classes: Tensor, kernel: str, sigma: float) -> Tensor:
    """Return the factor of each score, of masks in the order of theirs: the least that a better one asks for, by how
    far they overlap and how far that one itself overlaps with others."""
    flat = masks.flatten(1).float()
    areas = flat.sum(dim=1)
    shared = flat @ flat.t()
    overlap = (shared / (areas + areas[:, None] - shared)).triu(diagonal=1)
    overlap = overlap * (classes == classes[:, None]).triu(diagonal=1)
    worst = overlap.amax(dim=0)[:, None]
    if kernel == "linear":
        return ((1 - overlap) / (1 - worst)).amin(dim=0)
    return (torch.exp(-sigma * overlap**2) / torch.exp(-sigma * worst**2)).amin(dim=0)
