"""Regions of images in the texts of models that predict them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import isfinite
from numbers import Real
from typing import Any

from hfvlm.checks.messages import shown

Region = dict[str, Any]
# Pixels by which an annotated box may end beyond its image, as some that people drew do.
SLACK = 1
NO_BOX = "box: left, top, right and bottom in pixels are needed, right and below, not {}."


def intersection_over_union(left: Sequence[float], right: Sequence[float]) -> float:
    """Compare two boxes, left, top, right and bottom: 1 for the same, 0 for boxes that do not overlap."""
    (a, b, c, d), (e, f, g, h) = left, right
    shared = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    union = (c - a) * (d - b) + (g - e) * (h - f) - shared
    return shared / union if union > 0 else 0.0


def ordered_box(value: Any) -> list[float]:
    """Return a box, left, top, right and bottom.

    Raises:
        ValueError: it is not four finite numbers, or right or bottom comes before left or top.
    """
    numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else getattr(value, "tolist", list)()
    box = [float(n) for n in numbers if isinstance(n, Real) and not isinstance(n, bool) and isfinite(n)]
    if len(numbers) != 4 or len(box) != 4 or box[0] > box[2] or box[1] > box[3]:
        raise ValueError(NO_BOX.format(shown(value)))
    return box


def annotated_box(value: Any, size: tuple[int, int]) -> list[float]:
    """Return the box of a thing in an image of `size`, its width and height in pixels.

    Raises:
        ValueError: it is no box with an area, in shares of the image, or beyond it.
    """
    box, (width, height) = ordered_box(value), size
    if box[0] == box[2] or box[1] == box[3]:
        raise ValueError(NO_BOX.format(shown(value)))
    if max(box) <= 1:
        raise ValueError(f"box: pixels are needed, not shares of the image: {shown(value)}.")
    if min(box) < -SLACK or box[2] > width + SLACK or box[3] > height + SLACK:
        raise ValueError(f"box: {shown(value)} is not within the image of {width} x {height} pixels.")
    return box


class Grounding(ABC):
    """For the processor of a model whose answers contain regions; next to `ImageTextProcessor`."""

    @abstractmethod
    def regions(self, text: str, size: tuple[int, int]) -> list[Region]:
        """Find the regions of `post_process_grounding` in one answer about an image of this width and height."""

    @abstractmethod
    def grounding_text(
        self, label: str | None, boxes: Sequence[Sequence[float]], size: tuple[int, int] | None = None
    ) -> str:
        """Format a name and its boxes (left, top, right, bottom) as in the model's texts: the way back.

        Args:
            label: name of the object; None for regions without one.
            boxes: in pixels of an image of `size`, its width and height; without it, in the model's own unit. What is
                outside moves to the edge.

        Raises:
            ValueError: a box is none.
        """

    @abstractmethod
    def locating(self, expression: str) -> str:
        """Return the prompt for the box of what an expression names in one image, as the authors evaluate it."""

    def answered_box(self, answer: str, size: tuple[int, int]) -> list[float] | None:
        """Return the first box in an answer to `locating`, in pixels of an image of `size`; None without one."""
        return next((region["box_xyxy"] for region in self.regions(answer, size) if "box_xyxy" in region), None)

    def post_process_grounding(
        self, text: str | Sequence[str], sizes: Sequence[tuple[int, int]]
    ) -> list[Region] | list[list[Region]]:
        """Find the regions in an answer, in pixels.

        Args:
            text: an answer, or a list of them.
            sizes: width and height of each image, in PIL's order. For one answer the last is used, as by the authors;
                of several, each has one.

        Returns:
            For each answer a list of `{"label": ..., "box_xyxy": [left, top, right, bottom]}`. Other shapes are
            `"quad_xy": [[x, y], ...]`, four corners, and `"point_xy": [x, y]`. The label is the name right before the
            region, or None. Malformed regions are left out.

        Raises:
            ValueError: there are not as many sizes as answers.
        """
        alone = isinstance(text, str)
        if not sizes or not (alone or len(sizes) == len(text)):
            raise ValueError(f"sizes has the width and height of {len(sizes)} images: each answer needs one.")
        if alone:
            return self.regions(str(text), sizes[-1])
        return [self.regions(answer, size) for answer, size in zip(text, sizes, strict=True)]
