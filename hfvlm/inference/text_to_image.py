"""Images that are drawn of texts."""

from collections.abc import Sequence
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel

from hfvlm.checks.ranges import check_generation, check_integer, check_number
from hfvlm.inference.adapters import load_model, processor_of
from hfvlm.inference.embedder import Embedder
from hfvlm.inference.placement import find_device, placed
from hfvlm.processing.batches import texts_of


class ImageGenerator:
    """Images of texts, by any model that draws them.

    Args:
        model: with `draw`, which takes texts.
        processor: the model's, whose `to_images` makes Pillow's images.
        judge: of images and texts; where there is one, the images of a text come in the order in which it finds them
            fit the text, the best first.
        **options: of `generate`, for every call.

    Raises:
        ValueError: the model draws no images, or an option is out of its range.
    """

    def __init__(self, model: Any, processor: Any, judge: Embedder | None = None, **options: Any):
        check_options(options)
        if not callable(getattr(model, "draw", None)):
            raise ValueError(f"{type(model).__name__} draws no images of texts; DALL-E mini does.")
        self.model, self.processor, self.judge, self.options = model.eval(), processor, judge, options

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        judge: str | Path | None = None,
        device: str | torch.device = "auto",
        **kwargs: Any,
    ) -> "ImageGenerator":
        """Load a folder, an adapter's too, and `judge`, one of a model that embeds images and texts, as CLIP; `kwargs`
        are of the model's `from_pretrained`, as `dtype`."""
        model: Any = load_model(folder, AutoModel, **kwargs)
        found = None if judge is None else Embedder.from_pretrained(judge, device=device)
        return cls(model.to(find_device(device)), processor_of(folder), found)

    def __call__(
        self,
        texts: Sequence[str] | str,
        count: int = 1,
        *,
        batch_size: int = 16,
        seed: int | None = None,
        **options: Any,
    ) -> Any:
        """Draw images.

        Args:
            texts: one or a list.
            count: images of each.
            batch_size: images that the model draws at a time.
            seed: of the draws; None for others each time.
            **options: of `generate`: `guidance_scale=10.0`, `top_k=256`, `temperature=1.0`.

        Returns:
            A list of images, of a list of texts one for each.

        Raises:
            ValueError: a number is out of its range, or there are no texts.
        """
        check_integer("count", count)
        check_integer("batch_size", batch_size)
        check_options(options)
        several = not isinstance(texts, str)
        given: Any = list(texts_of(texts)) if several else [texts]
        rows = [text for text in given for _ in range(count)]
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(check_integer("seed", seed, 0))
            images = [
                image
                for start in range(0, len(rows), batch_size)
                for image in self.draw(rows[start : start + batch_size], options)
            ]
        grouped = [self.ranked(text, images[i * count : (i + 1) * count]) for i, text in enumerate(given)]
        return grouped if several else grouped[0]

    def draw(self, texts: list[str], options: dict[str, Any]) -> list[Image.Image]:
        inputs = placed(self.processor(text=texts, return_tensors="pt"), self.model)
        return self.processor.to_images(self.model.draw(**inputs, **self.options | options))

    def ranked(self, text: str, images: list[Image.Image]) -> list[Image.Image]:
        """Order images by how well the judge finds them to fit a text."""
        if self.judge is None or len(images) < 2:
            return images
        found = self.judge.encode(image=images, text=[text])
        scores = torch.as_tensor(found.similarity("image", "text"))[:, 0]
        return [images[i] for i in scores.argsort(descending=True, stable=True).tolist()]


def check_options(options: dict[str, Any]) -> None:
    check_generation(options)
    if options.get("guidance_scale") is not None:
        check_number("guidance_scale", options["guidance_scale"], 0)


def image_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Lay images of one size out in rows, from left to right; by default in as many rows as columns.

    Raises:
        ValueError: there are none, or their sizes differ.
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"{len(images)} images of the sizes {sorted(sizes)} make no grid.")
    width, height = sizes.pop()
    columns = check_integer("columns", ceil(sqrt(len(images))) if columns is None else columns)
    grid = Image.new("RGB", (width * columns, height * ceil(len(images) / columns)))
    for i, image in enumerate(images):
        grid.paste(image, (width * (i % columns), height * (i // columns)))
    return grid
