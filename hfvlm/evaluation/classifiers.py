"""The evaluation of image classifiers: their own classes against the labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hfvlm.checks.messages import shown
from hfvlm.evaluation.classification import label_ranks
from hfvlm.evaluation.data import Data, check_any
from hfvlm.evaluation.embedding import add_classes
from hfvlm.evaluation.report import Report
from hfvlm.inference.adapters import load_model
from hfvlm.inference.placement import check_dtype, find_device, placed
from hfvlm.media.images import read_image
from hfvlm.media.rows import UNREADABLE

BATCH = 16


def classification(
    folder: str, data: Data, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> Report:
    """Compare the classes that a classifier predicts with the labels.

    Args:
        folder: an image classifier's, as `hfvlm train` writes it.
        data: with images and labels, by the names of the classifier's classes or, without names, by their numbers.
        device: "auto" is a GPU where there is one.
        dtype: "auto" is the files' own.

    Raises:
        ValueError: the model is no classifier of images, a label is none of its classes, the data lack a column, or no
            row can be read.
    """
    rows = data.rows()
    place, precision = find_device(device), check_dtype(dtype)
    model = load_model(folder, AutoModelForImageClassification, dtype=precision).to(place).eval()
    classes = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    truth, images = own_classes(data, rows, classes), data.column(rows, "image")
    scores, errors = predicted(model, AutoImageProcessor.from_pretrained(folder), images, truth)
    check_any(scores, errors)
    numbers, logits = list(scores), np.stack(list(scores.values()))
    truth = truth[numbers]
    ranks = label_ranks(logits, truth)
    protocol = {"classes": len(classes), "split": data.split}
    report = Report(
        "classification", folder, data.dataset, len(numbers), protocol, errors=dict(sorted(errors.items()))
    )
    report.about = data.about(rows, ["image", "label"], model)
    report.add("accuracy", numbers, ranks < 1)
    report.add("accuracy@5", numbers, ranks < 5)
    add_classes(report, logits, truth, classes, [images[i] for i in numbers])
    return report


def own_classes(data: Data, rows: Any, classes: Sequence[str]) -> np.ndarray:
    """Return the number of each row's class among a classifier's, -1 for rows without a label.

    Raises:
        ValueError: a label is none of the classes.
    """
    names = data.own_labels(rows)
    if names is None:  # numbers without names
        return data.labels(rows, classes)[0]
    known = {name.replace("_", " "): i for i, name in enumerate(classes)}
    numbers = [known.get(name.replace("_", " "), len(classes)) for name in names]
    truth = np.array([*numbers, -1])[data.labels(rows, names)[0]]
    if (unknown := np.flatnonzero(truth == len(classes))).size:
        label = data.column(rows, "label")[int(unknown[0])]
        label = names[label] if isinstance(label, int) else label
        raise ValueError(f"{data.dataset}: label {shown(label)} is none of the model's: {', '.join(classes[:20])}.")
    return truth


def predicted(
    model: Any, processor: Any, images: Sequence[Any], truth: np.ndarray
) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """Return the logits of each row that has a label and can be read, by its number, and what is wrong with others."""
    errors = {int(row): "has no label." for row in np.flatnonzero(truth < 0)}
    read = dict[int, Any]()
    scores = dict[int, np.ndarray]()
    for row, image in enumerate(images):
        if row not in errors:
            try:
                read[row] = read_image(image).convert("RGB")
            except UNREADABLE as error:
                errors[row] = str(error)
        if read and (len(read) == BATCH or row + 1 == len(images)):
            inputs = placed(processor(images=list(read.values()), return_tensors="pt"), model)
            with torch.inference_mode():
                logits = model(**inputs).logits.float().cpu().numpy()
            scores |= dict(zip(read, logits, strict=True))
            read = {}
    return scores, errors
