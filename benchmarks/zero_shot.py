"""Zero-shot classification: the weights of classes from prompt templates, and the stock pipeline called again.

python -m benchmarks.zero_shot [--quick] [--rounds 7] [--device cuda] [--output zero_shot.json]
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import pipeline

from benchmarks.measuring import Growth, Item, Row, Run, Size, work
from benchmarks.models import clip_with_processor, embedding, native_of
from benchmarks.report import main
from hfvlm import Embedder, ZeroShotClassifier
from hfvlm.inference.templates import template_set

WORDS = [f"{colour} {shape}" for colour in ("red", "blue", "green", "white") for shape in ("circle", "square", "cat")]


def rows(size: Size) -> Iterator[Item]:
    model, processor = clip_with_processor(size)
    theirs = native_of(model, "clip")
    embedder = Embedder(model, processor)
    for templates, count in (("single", 40), ("imagenet-7", 8), ("imagenet", 2)):
        labels = names(size.pick(min(4, count), count))
        ways = {
            "hfvlm": lambda labels=labels, t=templates: ZeroShotClassifier(embedder, labels, t).weights,
            "careful": lambda labels=labels, t=templates: weights_by_hand(theirs, processor, labels, t, "longest"),
            "open_clip": lambda labels=labels, t=templates: weights_by_hand(
                theirs, processor, labels, t, "max_length"
            ),
        }
        if templates == "imagenet":  # hundreds of texts of 77 tokens take too long
            del ways["open_clip"]
        yield Row(f"weights of {len(labels)} classes, {templates}", ways)
    image = Image.new("RGB", (64, 48), "red")
    for count in size.pick((6,), (10, 100)):
        yield Row(f"pipeline called again with {count} labels", again(model, theirs, processor, names(count), image))
    classifier = ZeroShotClassifier(embedder, names(20))
    images = [image] * size.pick(2, 16)
    yield Row(
        f"{len(images)} images, cached classes",
        {
            "hfvlm": lambda: classifier.scores(images),
            "careful": torch.inference_mode()(lambda: scores_by_hand(theirs, processor, images, classifier.weights)),
        },
    )
    yield Growth(
        "work of cached classes with labels",
        (8, 64),
        lambda n: work(partial(ZeroShotClassifier(embedder, names(n)).scores, [image])),
        0.05,
    )
    yield Growth(
        "work of class weights with labels",
        (8, 16, 32),
        lambda n: work(lambda: ZeroShotClassifier(embedder, names(n))),
        1.2,
    )


def names(count: int) -> list[str]:
    return [f"{WORDS[i % len(WORDS)]} {i}" for i in range(count)]


def weights_by_hand(model: Any, processor: Any, labels: list[str], templates: str, padding: str) -> np.ndarray:
    """Build a classifier as open_clip's `build_zero_shot_classifier` does, a class at a time; or, padded to the
    longest, all texts in batches."""
    own = [[template.replace("{}", label) for template in template_set(templates)] for label in labels]
    if padding == "longest":
        flat = [text for texts in own for text in texts]
        vectors = [encoded(model, processor, flat[i : i + 256], padding) for i in range(0, len(flat), 256)]
        parts = torch.cat(vectors).split(len(own[0]))
    else:
        parts = [encoded(model, processor, texts, padding) for texts in own]
    means = torch.stack([part.mean(dim=0) for part in parts])
    return (means / means.norm(dim=-1, keepdim=True)).cpu().numpy()


@torch.inference_mode()
def encoded(model: Any, processor: Any, texts: list[str], padding: str) -> torch.Tensor:
    inputs = processor(text=texts, return_tensors="pt", padding=padding, truncation=True)
    vectors = embedding(model.get_text_features(input_ids=inputs["input_ids"].to(model.device)))
    return vectors / vectors.norm(dim=-1, keepdim=True)


def scores_by_hand(model: Any, processor: Any, images: list[Any], weights: np.ndarray) -> np.ndarray:
    batch = processor(images=images, return_tensors="pt")["pixel_values"].to(model.device)
    vectors = embedding(model.get_image_features(batch))
    return (vectors / vectors.norm(dim=-1, keepdim=True)).cpu().numpy() @ weights.T


def again(ours: Any, theirs: Any, processor: Any, labels: list[str], image: Image.Image) -> dict[str, Run]:
    """Call transformers' pipeline on one image after another with the same labels."""
    ways = {}
    for name, model in {"hfvlm": ours, "transformers": theirs}.items():
        parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
        classify = pipeline("zero-shot-image-classification", model=model, device=ours.device, **parts)
        classify(image, candidate_labels=labels)

        def scores(classify: Any = classify) -> list[float]:
            found = {row["label"]: row["score"] for row in classify(image, candidate_labels=labels)}
            return [found[label] for label in labels]

        ways[name] = scores
    return ways


if __name__ == "__main__":
    main({"zero_shot": rows}, __doc__)
