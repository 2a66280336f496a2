"""Detection of named things in images: the detector and the segmenter of `VideoGrounder`, and rules on boxes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForMaskGeneration, AutoModelForZeroShotObjectDetection, AutoProcessor

from hfvlm.checks.ranges import check_number
from hfvlm.inference.adapters import load_model
from hfvlm.inference.placement import find_device
from hfvlm.inference.zero_shot import ZeroShotClassifier
from hfvlm.processing.grounding import intersection_over_union

# The least cosine, and the least probability among all things, at which CLIP confirms a detection.
CONFIRMED_COSINE, CONFIRMED_SHARE = 0.2, 0.1


@dataclass
class Detection:
    """A thing in one image; the box is left, top, right and bottom in pixels, the mask `(H, W)`, bool."""

    label: str
    score: float
    box_xyxy: list[float]
    mask: np.ndarray | None = None


def overlap(left: Detection, right: Detection) -> float:
    """Return the intersection over union of two boxes."""
    return intersection_over_union(left.box_xyxy, right.box_xyxy)


def distinct(detections: Sequence[Detection], most_overlap: float) -> list[Detection]:
    """Suppress detections that overlap a likelier one more; return the others, the likeliest first."""
    found: list[Detection] = []
    for each in sorted(detections, key=lambda each: -each.score):
        if all(overlap(each, other) <= most_overlap for other in found):
            found.append(each)
    return found


def confirmed(image: Image.Image, detections: Sequence[Detection], classifier: ZeroShotClassifier) -> list[Detection]:
    """Select the detections to which CLIP gives their label, too, by the box's pixels, black outside of the mask."""
    if not detections:
        return []
    crops = [cut_out(image, each) for each in detections]
    cosines = classifier.scores(crops)
    predicted = classifier.predict(crops)
    return [
        each
        for each, row, ((label, share),) in zip(detections, cosines, predicted, strict=True)
        if label == each.label and share > CONFIRMED_SHARE and row.max() >= CONFIRMED_COSINE
    ]


def cut_out(image: Image.Image, detection: Detection) -> Image.Image:
    """Cut the box out of an image, at least one pixel of it."""
    pixels = np.asarray(image.convert("RGB"))
    if detection.mask is not None:
        pixels = pixels * detection.mask[..., None]
    left, top, right, bottom = detection.box_xyxy
    left, top = (min(max(0, int(np.floor(v))), n - 1) for v, n in zip((left, top), image.size, strict=True))
    return Image.fromarray(pixels[top : max(top + 1, int(np.ceil(bottom))), left : max(left + 1, int(np.ceil(right)))])


class TextDetector:
    """Detector of named things in images: GroundingDINO, or what transformers has with its interface.

    Args:
        model: as `AutoModelForZeroShotObjectDetection` loads it.
        processor: its own.
        threshold: of a box's score, and of the score of each word of its phrase.
    """

    def __init__(self, model: Any, processor: Any, *, threshold: float = 0.5):
        self.threshold = check_number("threshold", threshold, 0, 1)
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, threshold: float = 0.5, device: str = "cpu") -> "TextDetector":
        """Load a folder of a model and its processor."""
        model = load_model(folder, AutoModelForZeroShotObjectDetection).to(find_device(device))
        return cls(model, AutoProcessor.from_pretrained(folder), threshold=threshold)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], things: Sequence[str]) -> list[list[Detection]]:
        """Find things in images; return the detections of each image."""
        prompt = ". ".join(thing.lower() for thing in things) + "."
        inputs = self.processor(images=list(images), text=[prompt] * len(images), return_tensors="pt")
        inputs = inputs.to(self.model.device)
        found = self.processor.post_process_grounded_object_detection(
            self.model(**inputs),
            inputs["input_ids"],
            threshold=self.threshold,
            text_threshold=self.threshold,
            target_sizes=[(image.height, image.width) for image in images],
        )
        return [self.read(result, things, image.size) for result, image in zip(found, images, strict=True)]

    def read(self, result: Mapping[str, Any], things: Sequence[str], size: tuple[int, int]) -> list[Detection]:
        """Convert the detector's result for one image; boxes end where the image does."""
        limits = torch.tensor([*size, *size], dtype=torch.float32)
        boxes: Tensor = result["boxes"].float().cpu().clamp(min=0).minimum(limits)
        # Of no boxes transformers decodes one label, which is empty.
        rows = zip(result["text_labels"], result["scores"].tolist(), boxes.tolist(), strict=False)
        named = ((meant(phrase, things), score, box) for phrase, score, box in rows)
        return [Detection(label, score, box) for label, score, box in named if label is not None]


def meant(phrase: str, things: Sequence[str]) -> str | None:
    """Find the thing that shares most words with a phrase, which the detector puts together of single words."""
    predicted = set(re.findall(r"\w+", phrase.lower()))

    def share(thing: str) -> float:
        words = set(re.findall(r"\w+", thing.lower()))
        return len(words & predicted) / max(1, len(words | predicted))

    best = max(things, key=share)
    return best if share(best) > 0 else None


class BoxSegmenter:
    """Segmenter of what is in a box: SAM, as `AutoModelForMaskGeneration` loads it, the best of its three masks."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str = "cpu") -> "BoxSegmenter":
        """Load a folder of a model and its processor."""
        model = load_model(folder, AutoModelForMaskGeneration).to(find_device(device))
        return cls(model, AutoProcessor.from_pretrained(folder))

    @torch.no_grad()
    def __call__(self, image: Image.Image, boxes: Sequence[Sequence[float]]) -> list[np.ndarray]:
        """Segment what is in each box of an image; masks `(H, W)`, bool."""
        inputs = self.processor(images=image, input_boxes=[[list(box) for box in boxes]], return_tensors="pt")
        inputs = inputs.to(self.model.device)
        output = self.model(pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"])
        sizes = (inputs["original_sizes"], inputs["reshaped_input_sizes"])
        (masks,) = self.processor.post_process_masks(output.pred_masks, *sizes)
        best = output.iou_scores[0].argmax(dim=-1).tolist()
        return [mask[i].cpu().numpy() for mask, i in zip(masks, best, strict=True)]
