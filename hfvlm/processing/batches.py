"""Batches in any container, as lists: Series, columns, arrays of paths or texts, tuples and generators."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image


def listed(sources: Any) -> Any:
    """Return a batch in another container as a list; one source, a list or an array of numbers as it is.

    A tuple stays one: `(values, rate)` is one recording.
    """
    if isinstance(sources, str | bytes | bytearray | memoryview | tuple | list | Mapping | Image.Image | torch.Tensor):
        return sources
    if isinstance(sources, np.ndarray):
        return sources.tolist() if sources.dtype.kind in "OUS" else sources
    if hasattr(sources, "to_pylist"):  # pyarrow
        return sources.to_pylist()
    if hasattr(sources, "iloc") and hasattr(sources, "to_list"):  # pandas
        return sources.to_list()
    generated = isinstance(sources, Iterator) and not hasattr(sources, "read")
    return list(sources) if generated or isinstance(sources, Sequence) else sources


def is_source(item: Any) -> bool:
    """Whether an item is one input, a path, bytes, an array, an image or a row, and no number of an array in lists."""
    known = str | os.PathLike | bytes | bytearray | memoryview | np.ndarray | torch.Tensor | Image.Image | Mapping
    return isinstance(item, known) or hasattr(item, "read")


def of_sources(sources: Any) -> Any:
    """Return a batch as `listed` does; a tuple is a batch, too, where it holds no numbers."""
    sources = listed(sources)
    batch = isinstance(sources, tuple) and bool(sources) and all(map(is_source, sources))
    return list(sources) if batch else sources


def flat_images(images: Any) -> list[Any]:
    """Return the images in lists and tuples of any depth, or in an array of (B, H, W, C), one by one."""
    images = listed(images)
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return list(_flat(images))


def _flat(images: Any) -> Iterator[Any]:
    images = listed(images)
    if isinstance(images, list | tuple):
        for item in images:
            yield from _flat(item)
    else:
        yield images


def texts_of(text: Any, name: str = "text") -> Any:
    """Return a text, or a list of texts; words that are split already are lists in it.

    Raises:
        ValueError: there are none, or one is missing.
        TypeError: one is no text.
    """
    text = listed(text)
    if isinstance(text, str):
        return text
    if not isinstance(text, list | tuple):
        raise TypeError(f"{name} must be a string or a list of strings, not {type(text).__name__}.")
    if not len(text):
        raise ValueError(f"{name} is an empty list: give one text at least, or leave it out.")
    for i, item in enumerate(text):
        if item is None or (isinstance(item, float) and item != item):
            raise ValueError(f"{name} {i} is missing ({item}): leave it out, or pass an empty string.")
        if not isinstance(item, str | list | tuple):
            raise TypeError(f"{name} {i} must be a string, not {type(item).__name__}.")
    return list(text)


def is_empty(media: Any) -> bool:
    """Whether media count as none: None, or lists without a single item."""
    media = listed(media)
    return media is None or (isinstance(media, list | tuple) and all(map(_is_empty_list, media)))


def _is_empty_list(item: Any) -> bool:
    return isinstance(item, list | tuple) and all(map(_is_empty_list, item))
