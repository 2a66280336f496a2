"""Processors of texts with images in them: the inputs of chat models."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import MultiModalData

from hfvlm.media.images import read_images
from hfvlm.processing.batches import flat_images
from hfvlm.processing.media_text import FIXED_OPTIONS, UNCOUNTED, MediaTextProcessor


class ImageTextProcessor(MediaTextProcessor):
    """Base of processors of texts with images. A subclass counts the tokens of images in `count_tokens`."""

    modality = "image"
    image_token = "<image>"
    # Videos, where a subclass reads them, are lists of frames.
    fixed_options = FIXED_OPTIONS | {"do_sample_frames": (None, False)}

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.mark_media()

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @abstractmethod
    def count_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Count the placeholders of images of these heights and widths in pixels."""

    def count_views(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Count the rows of `pixel_values` that each image becomes."""
        return [1] * len(image_sizes)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Count tokens and views of images of these heights and widths in pixels, as vLLM asks a processor to."""
        if further := sorted(set(kwargs) - UNCOUNTED):
            raise TypeError(f"{type(self).__name__} counts the tokens of images as they are, without {further}.")
        if image_sizes is None:
            return MultiModalData()
        sizes = [(int(height), int(width)) for height, width in image_sizes]
        return MultiModalData(num_image_tokens=self.count_tokens(sizes), num_image_patches=self.count_views(sizes))

    def count_each(self, media: Sequence[Any], **options: Any) -> list[int]:
        return self.count_tokens([(image.height, image.width) for image in media])

    def read(self, sources: Any, *, allow_urls: Any = False) -> list[Any]:
        upright = self.media_processor.upright
        return read_images(flat_images(sources), upright=upright, allow_urls=allow_urls)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare texts and their images as inputs of the model, padded where there are several.

        Args:
            images: one image, a list, or a list of lists, one for each text; see `hfvlm.media.read_image`.
            text: one text or a list, with `image_token` where each image is.
            **kwargs: `return_tensors`, "pt", "np", or None for lists; `max_length`, tokens of the longest row;
                `truncation` to cut longer rows, never in an image: "pictures" drops those that do not fit, and what
                follows them, True refuses; `padding`, `padding_side`, `pad_to_multiple_of` of the tokenizer; and
                options of the image processor.

        Raises:
            ValueError: texts and images do not fit each other, or a row does not fit `max_length`.
        """
        return self.inputs_for(images, text, **kwargs)
