"""Tasks of vision, shown by one image with its painted target."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageToImage

from hfvlm.checks.ranges import check_integer
from hfvlm.inference.adapters import load_model, processor_of
from hfvlm.inference.placement import find_device, placed
from hfvlm.media.images import read_image
from hfvlm.media.rows import are_several


class Painter:
    """Segmentation, keypoints, depth, restoration, or whatever else a pair of an image and its target shows.

        painter = hfvlm.Painter.from_pretrained("painter_vit_large")
        pair = painter.prompt("room.jpg", millimetres, task="depth")
        depth = painter("kitchen.jpg", pair, task="depth")  # (H, W), in millimetres

    Args:
        model: a Painter.
        processor: the model's.
    """

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "auto", **kwargs: Any) -> "Painter":
        """Load a folder, an adapter's too; `kwargs` are of the model's `from_pretrained`, as `dtype`."""
        model: Any = load_model(folder, AutoModelForImageToImage, **kwargs)
        return cls(model.to(find_device(device)), processor_of(folder))

    def prompt(self, image: Any, annotation: Any, task: str, **options: Any) -> tuple[Any, Image.Image]:
        """Make a prompt of an image and the annotation of a task, which is painted.

        Args:
            image: as `hfvlm.media.read_image` reads it.
            annotation: of "semantic", a map of classes `(H, W)` from 0, -1 for none; of "instances", masks
                `(N, H, W)`; of "keypoints", joints `(17, 2)` in pixels; of "depth", millimetres `(H, W)`; of the
                others, an image.
            task: of the processor's.
            **options: of the task: `palette`, `boxes`, `visible`, `size`, `sigmas`.
        """
        return image, self.processor.encode(task, annotation, **options)

    def paint(self, images: Any, prompts: Any, *, batch_size: int = 1) -> Tensor:
        """Paint one image or a list -> `(B, 3, 2 * S, S)`, normalised, the queries' targets in the lower half.

        Args:
            images: as `hfvlm.media.read_image` reads them.
            prompts: a pair of an image and its painted target for all of them, or a list with a pair for each.
            batch_size: images that the model takes at a time.
        """
        check_integer("batch_size", batch_size)
        sources = images if are_several(images) else [images]
        one = not isinstance(prompts, list)
        if not one and len(prompts) not in (1, len(sources)):
            raise ValueError(f"{len(sources)} images need one prompt, or as many, not {len(prompts)}.")
        painted = []
        for i in range(0, len(sources), batch_size):
            pairs = prompts if one or len(prompts) == 1 else prompts[i : i + batch_size]
            inputs = placed(self.processor(images=sources[i : i + batch_size], prompts=pairs), self.model)
            with torch.inference_mode():
                painted.append(self.model(**inputs).reconstruction.float().cpu())
        return torch.cat(painted)

    def __call__(self, images: Any, prompts: Any, *, task: str = "image", batch_size: int = 1, **options: Any) -> Any:
        """Do to images what a prompt shows.

        Args:
            images: one or a list, as `hfvlm.media.read_image` reads them.
            prompts: a pair of an image and its painted target, as `prompt` makes it, for all images, or a list with a
                pair for each.
            task: how to read what is painted: "image" as it is; "semantic", "instances", "keypoints", "depth",
                "denoise", "derain", "low_light".
            batch_size: images that the model takes at a time.
            **options: of the task: `palette`, `kind`, `threshold`, `most`.

        Returns:
            The result of an image, or of a list a list: of "semantic", a map of classes `(H, W)`; of "instances",
            masks, scores and classes; of "keypoints", points and heat maps; of "depth", millimetres `(H, W)`; of the
            others, an image.

        Raises:
            MediaError: an image cannot be read; the message names it.
            TypeError: an option that the task does not have.
            ValueError: there is no such task, a number is out of its range, or prompts do not fit the images.
        """
        queries = self.read(images)
        painted = self.paint(queries, prompts, batch_size=batch_size)
        results = self.processor.decode(painted, task, sizes_of(queries), **options)
        return results if are_several(images) else results[0]

    def instances(
        self, images: Any, prompts: Any, classes: Any, *, batch_size: int = 1, palette: Any = "coco", **options: Any
    ) -> Any:
        """Find instances with their classes, of two paintings of each image.

        Args:
            images: one or a list.
            prompts: of "instances".
            classes: prompts of "semantic".
            batch_size: images that the model takes at a time.
            palette: of the classes; the first 80 are things.
            **options: `threshold` and `most`.
        """
        queries = self.read(images)
        paintings = [self.paint(queries, pairs, batch_size=batch_size) for pairs in (prompts, classes)]
        found = self.processor.decode_instances(*paintings, sizes_of(queries), palette, **options)
        return found if are_several(images) else found[0]

    def read(self, images: Any) -> list[Image.Image]:
        """Read one image or a list, as upright as the processor does."""
        upright = self.processor.image_processor.upright
        sources = images if are_several(images) else [images]
        return [read_image(source, upright=upright, index=i) for i, source in enumerate(sources)]


def sizes_of(images: Sequence[Image.Image]) -> list[tuple[int, int]]:
    """Return height and width of each image."""
    return [(image.height, image.width) for image in images]
