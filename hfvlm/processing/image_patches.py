"""Bases of processors of models in whose texts each patch of an image is a token."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from hfvlm.processing.batches import is_empty, texts_of
from hfvlm.processing.grounding import Grounding, ordered_box
from hfvlm.processing.image_text import ImageTextProcessor
from hfvlm.processing.settings import whole

# Between regions of one answer.
BETWEEN = " ; "


class ImagePatchesProcessor(ImageTextProcessor):
    """Base of processors of texts with square images, each as many placeholders as it has patches.

    Attributes:
        patch_size: of the vision tower, in pixels.
    """

    patch_size: Annotated[int, whole(1, 2**10)]

    def count_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        edge = self.image_processor.size["height"] // self.patch_size
        return [edge * edge] * len(image_sizes)


class ImagesFirstProcessor(ImagePatchesProcessor, Grounding):
    """Base of processors of texts in which all images come before the words, as in PaLI's and PaliGemma's.

    Attributes:
        caption: the prompt of images without a text.
        system: what the model is called, for messages.
    """

    caption: ClassVar[str]
    system: ClassVar[str]

    def divided(self, text: str) -> tuple[int, str]:
        """Count the images at the beginning of a text, and return the words after them.

        Raises:
            ValueError: an image comes after words.
        """
        words, images = text.lstrip() if text.lstrip().startswith(self.image_token) else text, 0
        while words.startswith(self.image_token):
            words, images = words.removeprefix(self.image_token), images + 1
        if self.image_token in words:
            raise ValueError(
                f"{text[:200]!r}: images come first in {self.system}'s texts, {self.image_token} before words."
            )
        return images, words

    def asking(self, images: Any, text: Any) -> Any:
        """Return the texts, or without any the prompt of a caption for each image."""
        if text is not None or is_empty(images):
            return text
        prompt = f"{self.image_token}{self.caption}"
        return [prompt] * len(images) if isinstance(self.batched(images), list | tuple) else prompt

    def answers_to(self, texts: int, suffix: Any) -> list[str]:
        """Return the answers, one to each text.

        Raises:
            ValueError: there are more or fewer.
        """
        answers = [suffix] if isinstance(suffix, str) else list(texts_of(suffix, "suffix"))
        if len(answers) != texts:
            raise ValueError(f"{texts} texts, and suffix has {len(answers)}: each text has one answer.")
        return answers

    @abstractmethod
    def box_text(self, shares: Sequence[float]) -> str:
        """Format the top, left, bottom and right of a box, in shares of the image."""

    def grounding_text(
        self, label: str | None, boxes: Sequence[Sequence[float]], size: tuple[int, int] | None = None
    ) -> str:
        """Format boxes, see `Grounding`; the model's own unit is the image's width and height."""
        width, height = size or (1, 1)
        formatted = (
            self.box_text([top / height, left / width, bottom / height, right / width])
            for left, top, right, bottom in map(ordered_box, boxes)
        )
        return BETWEEN.join(f"{box} {label}" if label else box for box in formatted)


def box_in_pixels(shares: Sequence[float], size: tuple[int, int]) -> list[float]:
    """Return left, top, right and bottom in pixels of an image of this width and height, of the top, left, bottom and
    right in shares of it."""
    (top, left, bottom, right), (width, height) = shares, size
    return [left * width, top * height, right * width, bottom * height]
