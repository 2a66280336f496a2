"""What processors share whose models say where in a picture something is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

Place = dict[str, Any]


class Grounding(ABC):
    """For the processor of a model whose answers name places; beside `ImageTextProcessor`."""

    @abstractmethod
    def places(self, text: str, size: tuple[int, int]) -> list[Place]:
        """What `post_process_grounding` says of one answer about a picture of this width and height."""

    @abstractmethod
    def grounding_text(
        self, label: str | None, boxes: Sequence[Sequence[float]], size: tuple[int, int] | None = None
    ) -> str:
        """The way back: a name and its boxes (left, top, right, bottom) as the model reads and writes them.

        Args:
            label: what is there; None for places without a name.
            boxes: in pixels of a picture of `size`, its width and height; without it, in the model's own measure.
        """

    def post_process_grounding(
        self, text: str | Sequence[str], sizes: Sequence[tuple[int, int]]
    ) -> list[Place] | list[list[Place]]:
        """The places that an answer names, in pixels.

        Args:
            text: an answer, or a list of them.
            sizes: width and height of each picture, as PIL says them. Of one answer the last is meant, as the authors
                have it; of several, each has one.

        Returns:
            Of each answer a list of `{"label": ..., "box_xyxy": [left, top, right, bottom]}`. Other shapes are
            `"quad_xy": [[x, y], ...]`, four corners, and `"point_xy": [x, y]`. The label is the name right before the
            place, or None. What is no place is left out.

        Raises:
            ValueError: there are not as many sizes as answers.
        """
        alone = isinstance(text, str)
        if not sizes or not (alone or len(sizes) == len(text)):
            raise ValueError(f"sizes say the width and height of {len(sizes)} pictures: each answer needs one.")
        if alone:
            return self.places(str(text), sizes[-1])
        return [self.places(answer, size) for answer, size in zip(text, sizes, strict=True)]
