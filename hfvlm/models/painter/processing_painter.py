"""Painter's inputs and outputs (baaivision/Painter at cfec845, eval/*/painter_inference_*.py).

Images and targets are squashed to squares; the prompt's is above the query's. The query's target, which is hidden, is
a copy of the prompt's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_base import BatchFeature

from hfvlm.checks.keywords import check_keywords
from hfvlm.media.resizing import squash
from hfvlm.models.painter.codes import FARTHEST, class_distances, decode_classes, encode_classes, encode_depth
from hfvlm.models.painter.instances import decode_instances, encode_instances
from hfvlm.models.painter.keypoints import decode_keypoints, encode_keypoints, peaks
from hfvlm.processing.base import HfvlmProcessor, call_keywords
from hfvlm.processing.batches import flat_images
from hfvlm.processing.images import FixedSizeImageProcessor
from hfvlm.processing.settings import Filter

# The names that the tasks have, and what their targets are.
TASKS = {
    "image": "any image",
    "semantic": "a map of classes",
    "instances": "masks of instances",
    "keypoints": "the joints of a person",
    "depth": "a map of depths",
    "denoise": "the image without noise",
    "derain": "the image without rain",
    "low_light": "the image in good light",
}
# Whose colours stand for where something is: none lies between two others.
FIXED = ("instances", "keypoints")
RESTORATIONS = ("denoise", "derain", "low_light")


@dataclass
class Keypoints:
    """The joints of a person.

    Args:
        points: `(17, 3)`: x and y in pixels of the image, and how high the heat map is there, of 0 to 1.
        maps: `(17, H, W)`.
    """

    points: np.ndarray
    maps: np.ndarray


def check_task(task: str) -> str:
    """Return a task.

    Raises:
        ValueError: there is none of that name.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is none of {', '.join(TASKS)}.")
    return task


class HfvlmPainterImageProcessor(FixedSizeImageProcessor):
    """Images as RGB, squashed to 448 px, bicubic; targets likewise.

    Args:
        target_resample: Pillow's filter for targets; 3 is bicubic, as in the original's evaluations; 0 is nearest, as
            in its training on maps of classes and on instances.
    """

    size = {"height": 448, "width": 448}
    resize_mode = "squash"
    image_mean = [0.485, 0.456, 0.406]
    image_std = [0.229, 0.224, 0.225]
    target_resample: Filter = 3

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super().checked(settings)
        if settings["resize_mode"] != "squash" or not settings["antialias"]:
            raise ValueError(f"{type(self).__name__}: resize_mode must be 'squash', and antialias True.")
        return settings

    def resize(self, image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
        size = settings["size"]["height"], settings["size"]["width"]
        return squash(image.convert("RGB"), size, settings["resample"])

    def paint_of(self, values: Tensor) -> Tensor:
        """Turn normalised pixels `(B, 3, H, W)` into values of mostly 0 to 1, in float64."""
        mean, std = (torch.tensor(each, dtype=torch.float64) for each in (self.image_mean, self.image_std))
        values = values.detach().cpu().double()
        return values * std[:, None, None] + mean[:, None, None]


class HfvlmPainterProcessor(HfvlmProcessor):
    """Pairs of images and targets to Painter's inputs, and what it paints to the results of a task:
    `processor(images=query, prompts=(image, target))`, then `model(**inputs)`, then `decode`."""

    parts = {"image": "image_processor"}

    def __init__(self, image_processor: Any = None, **kwargs: Any):
        super().__init__(image_processor, **kwargs)

    def __call__(self, images: Any = None, prompts: Any = None, targets: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare queries and the pairs that show their task -> the model's inputs.

        Args:
            images: one query or a list; see `hfvlm.media.read_image` for what an image may be.
            prompts: an image and its painted target, for all queries, or a list with a pair for each.
            targets: painted targets of the queries, for a loss; by default those of the prompts, which are hidden.
            **kwargs: `return_tensors`, "pt", "np", or None for lists; settings of the image processor, and these in
                `images_kwargs`.

        Returns:
            `pixel_values` and `target_values` `(B, 3, 2 * S, S)`, and `bool_masked_pos` is left to the model, which
            hides the lower half.

        Raises:
            MediaError: an image cannot be read; the message names it.
            TypeError: a keyword that is unknown.
            ValueError: there are no queries or prompts, or more or fewer of one than of the other.
        """
        queries = [] if images is None else flat_images(images)
        if images is not None and not queries:
            raise ValueError(f"{type(self).__name__} was given no images: an empty list.")
        if images is None or prompts is None:
            raise ValueError(f"{type(self).__name__} needs images, and prompts: a pair of an image and its target.")
        return_tensors = kwargs.pop("return_tensors", "pt")
        options = self.options_of(kwargs, {"images": call_keywords(self.image_processor)}, flat=("images",))["images"]
        pairs = pairs_of(prompts, len(queries))
        hidden = [target for _, target in pairs] if targets is None else flat_images(targets)
        if len(hidden) != len(queries):
            raise ValueError(f"{len(queries)} images need as many targets, not {len(hidden)}.")
        resample = options.pop("target_resample", None)
        resample = self.image_processor.target_resample if resample is None else resample
        shown = {"target_resample": resample}
        values = {
            "pixel_values": self.stacked([image for image, _ in pairs], queries, options | shown),
            "target_values": self.stacked(
                [target for _, target in pairs], hidden, options | shown | {"resample": resample}
            ),
        }
        return BatchFeature(values, tensor_type=return_tensors)

    def prepare(self, modality: str, sources: Any, return_tensors: str | None = "pt", **options: Any) -> BatchFeature:
        """Prepare images as queries that are their own prompts: inputs to check a model by, which show it no task."""
        if modality not in self.modalities:
            raise ValueError(f"{type(self).__name__} prepares {', '.join(self.modalities)}, not {modality}.")
        images = flat_images(sources)
        return self(images, [(image, image) for image in images], return_tensors=return_tensors, **options)

    def stacked(self, upper: Sequence[Any], lower: Sequence[Any], options: Mapping[str, Any]) -> list[np.ndarray]:
        """Put images over others -> `(3, 2 * S, S)` each."""
        device = {"device": None} if "device" in options else {}
        arrays = self.image_processor([*upper, *lower], **{**options, **device, "return_tensors": None})[
            "pixel_values"
        ]
        half = len(upper)
        return [np.concatenate([arrays[i], arrays[half + i]], axis=1) for i in range(half)]

    def encode(self, task: str, annotation: Any, **options: Any) -> Image.Image:
        """Paint an annotation as the target of a task.

        Args:
            task: one of `TASKS`.
            annotation: of "semantic", a map of classes `(H, W)` from 0, -1 for none; of "instances", masks
                `(N, H, W)`; of "keypoints", joints `(17, 2)`; of "depth", millimetres `(H, W)`; of the others, an
                image.
            **options: of `codes.encode_classes`, `instances.encode_instances` or `keypoints.encode_keypoints`:
                `palette`, `boxes`, `visible`, `size`, `sigmas`.

        Raises:
            TypeError: an option that the task does not have.
            ValueError: there is no such task, or the annotation is none of it.
        """
        paint, known = ENCODERS.get(check_task(task), (None, ()))
        check_keywords(f"{type(self).__name__}.encode, {task}", options, known)
        if paint is None:
            from hfvlm.media.images import read_image

            return read_image(annotation, upright=self.image_processor.upright).convert("RGB")
        return Image.fromarray(paint(annotation, **options))

    def paintings(self, reconstruction: Tensor, task: str, sizes: Sequence[tuple[int, int]]) -> list[Any]:
        """Cut out what was painted for the queries, at their sizes.

        Args:
            reconstruction: `(B, 3, 2 * S, S)`, of the model's output.
            task: one of `TASKS`; depths are arrays `(H, W)` in millimetres, int32, all others images, uint8.
            sizes: height and width in pixels of each query.
        """
        if len(sizes) != len(reconstruction):
            raise ValueError(f"{len(reconstruction)} images were painted, {len(sizes)} sizes are given.")
        halves = self.image_processor.paint_of(reconstruction).chunk(2, dim=2)[1]
        check_task(task)
        return [painting(half, task, (size[0], size[1])) for half, size in zip(halves, sizes, strict=True)]

    def decode(self, reconstruction: Tensor, task: str, sizes: Sequence[tuple[int, int]], **options: Any) -> list[Any]:
        """Read the results of a task out of what was painted.

        Args:
            reconstruction: `(B, 3, 2 * S, S)`, of the model's output.
            task: one of `TASKS`.
            sizes: height and width in pixels of each query.
            **options: `palette` and `kind` of "semantic"; `threshold` and `most` of "instances".

        Returns:
            For each query: of "semantic", a map of classes `(H, W)`; of "instances", `instances.Instances`; of
            "keypoints", `Keypoints`; of "depth", millimetres `(H, W)`; of the others, an image.

        Raises:
            TypeError: an option that the task does not have.
            ValueError: there is no such task, or not a size for each query.
        """
        read, known = DECODERS.get(check_task(task), (Image.fromarray, ()))
        check_keywords(f"{type(self).__name__}.decode, {task}", options, known)
        return [read(each, **options) for each in self.paintings(reconstruction, task, sizes)]

    def decode_instances(
        self, painted: Tensor, classes: Tensor, sizes: Sequence[tuple[int, int]], palette: Any = "coco", **options: Any
    ) -> list[Any]:
        """Read instances with classes out of two paintings of the same queries.

        Args:
            painted: `(B, 3, 2 * S, S)`, with prompts of "instances".
            classes: `(B, 3, 2 * S, S)`, with prompts of "semantic".
            sizes: height and width in pixels of each query.
            palette: of the classes; the first 80 are things.
            **options: `threshold` and `most`.
        """
        check_keywords(f"{type(self).__name__}.decode_instances", options, ("threshold", "most"))
        pairs = zip(
            self.paintings(painted, "instances", sizes), self.paintings(classes, "semantic", sizes), strict=True
        )
        return [decode_instances(where, class_distances(what, palette), **options) for where, what in pairs]


def pairs_of(prompts: Any, queries: int) -> list[tuple[Any, Any]]:
    """Return a pair of an image and its target for each query.

    Raises:
        ValueError: there is not one pair, nor one for each query.
    """
    several = isinstance(prompts, list)
    pairs = prompts if several else [prompts]
    if any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs):
        raise ValueError("prompts must be a pair (image, target), or a list of such pairs, one for each image.")
    if several and len(pairs) not in (1, queries):
        raise ValueError(f"{queries} images need one prompt, or as many, not {len(pairs)}.")
    pairs = pairs * queries if len(pairs) == 1 else pairs
    return [(image, target) for image, target in pairs]


def painting(half: Tensor, task: str, size: tuple[int, int]) -> np.ndarray:
    """Resize what was painted, `(3, S, S)` of about 0 to 1 -> `(H, W, 3)`, uint8, or of "depth" `(H, W)`, int32.

    As in the original, restored images are resized first, bicubic, and then cut to 0 to 1; others the other way round:
    bilinear, or nearest where colours stand for places or joints.
    """
    if task in RESTORATIONS:
        resized = F.interpolate(half[None], size=size, mode="bicubic")[0]
        return (resized.clamp(0, 1) * 255).permute(1, 2, 0).numpy().astype(np.uint8)
    white = FARTHEST if task == "depth" else 255
    mode = "nearest" if task in FIXED else "bilinear"
    resized = F.interpolate((half * white).clamp(0, white)[None], size=size, mode=mode)[0]
    if task == "depth":
        return resized.mean(dim=0).int().numpy()
    return resized.permute(1, 2, 0).int().numpy().astype(np.uint8)


def keypoints_of(image: np.ndarray) -> Keypoints:
    """Read joints out of a painted image."""
    maps = decode_keypoints(image)
    return Keypoints(peaks(maps), maps)


# Of each task, what paints its annotations and what reads its paintings, with their options.
ENCODERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "semantic": (encode_classes, ("palette",)),
    "instances": (encode_instances, ("boxes",)),
    "keypoints": (encode_keypoints, ("visible", "size", "sigmas")),
    "depth": (encode_depth, ()),
}
DECODERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "semantic": (decode_classes, ("palette", "kind")),
    "instances": (decode_instances, ("threshold", "most")),
    "keypoints": (keypoints_of, ()),
    "depth": (lambda depth: depth, ()),
}
