"""The second stage of retrieval: matching the best candidates of a search."""

from pathlib import Path
from typing import Any

import torch

from hfvlm.checks.ranges import check_integer
from hfvlm.inference.adapters import load_model, processor_of


def rerank(
    folder: str | Path, images: list[Any], texts: list[str], *, top_k: int = 128, **options: Any
) -> tuple[Any, Any]:
    """Score every image against every text: the `top_k` by their embeddings are matched, image with text.

    Args:
        folder: of a model with `rerank`, as `HfvlmBLIPForImageTextRetrieval`.
        images: as `hfvlm.media.read_image` takes them.
        texts: the candidates; of a search, the captions of its hits, or the query.
        top_k: how many texts are matched with each image, and images with each text.
        **options: of the model's `from_pretrained`.

    Returns:
        `(images, texts)` scores of the texts for each image and `(texts, images)` of the images for each text,
        arrays; -100 for those that were not matched.

    Raises:
        ValueError: the model has only embeddings, or top_k is no number of candidates.
        MediaError: an image cannot be read; the message names it.
    """
    check_integer("top_k", top_k)
    model: Any = load_model(folder, **options).eval()
    if not hasattr(model, "rerank"):
        raise ValueError(f"{folder}: {type(model).__name__} has only embeddings, and cannot match pairs.")
    model.to(torch.accelerator.current_accelerator() or "cpu")
    processor = processor_of(folder)
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, truncation=True).to(model.device)
    scores = model.rerank(**inputs, top_k=top_k)
    return scores.per_image.float().cpu().numpy(), scores.per_text.float().cpu().numpy()
