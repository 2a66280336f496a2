"""Batches for models that are shown a task by one image with its target, as Painter."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.media.images import read_image
from hfvlm.media.rows import undecoded
from hfvlm.models.painter.pairs import (
    FIXED,
    TALL_RATIO,
    Box,
    Draw,
    PairAugmentation,
    PairMask,
    draw_box,
    filters_of,
    loss_weights,
    recrop,
)

TRIES = 10
# What a row without a task is taken for.
TASK = "image"


class PaintingCollator:
    """Collator of rows with an image, its painted target and the name of their task to the inputs of a Painter: two
    pairs of a task, one above the other, with some patches of the targets hidden.

    In training, both pairs are cropped, mirrored and changed in colour, and most pairs of pairs are cropped once more;
    of "instances" and "keypoints", nothing is. In evaluations nothing is random, and the lower target is hidden.

    Args:
        processor: of the model.
        patch_size: of the model, in pixels.
        rows: the data set that the upper pair is drawn from, among the rows of the same task.
        columns: {"image": "photo", "target": "labels", "task": "kind"}: the columns; by default they have these names.
            Tasks are any texts; those of the processor have their own augmentation and weights of the loss.
        hidden: share of the patches that is hidden.
        half: probability of hiding all of the lower target instead.
        crop_scale: smallest share of an image's area that a crop takes.
        augment: False for no augmentation at all.
    """

    def __init__(
        self,
        processor: Any,
        patch_size: int,
        rows: Any,
        columns: Mapping[str, str] | None = None,
        *,
        hidden: float = 0.5,
        half: float = 0.1,
        crop_scale: float = 0.3,
        augment: bool = True,
    ):
        check_number("hidden", hidden, 0, 1, open_low=True)
        check_number("half", half, 0, 1)
        check_number("crop_scale", crop_scale, 0, 1, open_low=True)
        check_integer("patch_size", patch_size)
        self.processor, self.rows, self.columns = processor, undecoded(rows), dict(columns or {})
        self.crop_scale, self.augment = crop_scale, augment
        size = processor.image_processor.size
        if size["height"] != size["width"] or size["height"] % patch_size:
            raise ValueError(f"size {size} must be a square of whole patches of {patch_size} pixels.")
        self.size, edge = size["height"], size["height"] // patch_size
        total = max(1, round(2 * edge * edge * hidden))
        least = min(16, total)
        self.mask = PairMask(2 * edge, edge, total=total, least=least, most=max(least, total // 2), half=half)
        self.by_task: dict[str, list[int]] | None = None

    def partners(self, task: str) -> list[int]:
        """Return the indices of the rows of a task."""
        if self.by_task is None:
            column, found = self.columns.get("task", "task"), dict[str, list[int]]()
            for index in range(len(self.rows)):
                found.setdefault(str(self.rows[index].get(column) or TASK), []).append(index)
            self.by_task = found
        return self.by_task.get(task, [])

    def read(self, row: Mapping[str, Any], random: np.random.Generator | None) -> dict[str, Any]:
        """Read a row and the pair that shows its task -> the model's inputs, without a batch.

        Raises:
            KeyError: the data set has no column for the image or the target.
            ValueError: no other row shows the task.
        """
        task = str(row.get(self.columns.get("task", "task")) or TASK)
        indices = self.partners(task)
        if not indices:
            raise ValueError(f"No row shows the task {task!r}.")
        shown = self.rows[indices[0 if random is None else int(random.integers(len(indices)))]]
        pairs = [self.pair(each) for each in (shown, row)]
        changes, augmentation = self.augment and random is not None, self.augmentation(task)
        filters = filters_of(task)
        made = []
        for image, target in pairs:
            whole = Draw(Box(0, 0, image.height, image.width))
            drawn = augmentation.draw(image.height, image.width, random) if changes else whole
            made.append(augmentation.apply(image, target, drawn, filters=filters))
        images, targets = (torch.cat(values, dim=1) for values in zip(*made, strict=True))
        half = random is None or random.random() < self.mask.half
        if changes and not half and task not in FIXED:
            box = draw_box(images.shape[1], images.shape[2], (self.crop_scale, 1.0), TALL_RATIO, random)
            images, targets = (recrop(x, box, by) for x, by in zip((images, targets), filters, strict=True))
        seed = None if half or random is None else int(random.integers(2**63))
        mask = self.mask.lower_half() if seed is None else self.mask(Random(seed))
        return {
            "pixel_values": images,
            "target_values": targets,
            "bool_masked_pos": torch.from_numpy(mask),
            "loss_weights": loss_weights(targets, task),
        }

    def augmentation(self, task: str) -> PairAugmentation:
        """Return what is done to the pairs of a task in training."""
        fixed = PairAugmentation.of_task(task, self.size)
        return fixed if task in FIXED else PairAugmentation(self.size, (self.crop_scale, 1.0))

    def pair(self, row: Mapping[str, Any]) -> tuple[Image.Image, Image.Image]:
        """Read the image and the target of a row, as RGB; a target of another size is resized to the image's."""
        upright = self.processor.image_processor.upright
        image, target = (
            read_image(row[self.columns.get(name, name)], upright=upright).convert("RGB")
            for name in ("image", "target")
        )
        return image, target if target.size == image.size else target.resize(image.size, Image.Resampling.NEAREST)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows of `Rows` to the model's inputs and "replaced", which the trainer takes out again; rows of a
        data set to the model's inputs and "return_loss"."""
        read = rows if "replaced" in rows[0] else [self.read(row, None) for row in rows]
        names = ("pixel_values", "target_values", "bool_masked_pos", "loss_weights")
        inputs: dict[str, Any] = {name: torch.stack([row[name] for row in read]) for name in names}
        if read is rows:
            return inputs | {"replaced": torch.tensor([row["replaced"] for row in rows])}
        return inputs | {"return_loss": True}
