"""The evaluations of models that paint: maps of classes, depths and restored images against the true ones.

The task is shown by one row of the split to train on, as in the paper (https://arxiv.org/abs/2212.02499).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from hfvlm.checks.ranges import check_integer
from hfvlm.evaluation.bootstrap import interval
from hfvlm.evaluation.data import Data, check_any
from hfvlm.evaluation.painting import FARTHEST, NEAREST, WINDOW, confusion, depth_errors, overlap_scores, psnr, ssim
from hfvlm.evaluation.report import MOST_MISTAKES, Mistake, Report, Result
from hfvlm.inference.painter import Painter
from hfvlm.media.images import read_image
from hfvlm.media.rows import UNREADABLE, path_of
from hfvlm.models.painter.codes import palette_of
from hfvlm.models.painter.processing_painter import RESTORATIONS

BATCH = 4
# Of an image that is restored exactly, in decibels: no mean holds an infinite one.
HIGHEST_PSNR = 100.0
MILLIMETRES = 1000.0


def segmentation(folder: str, data: Data, *, palette: Any = "ade20k", shown: int = 0, **options: Any) -> Report:
    """Compare maps of classes.

    Args:
        folder: a Painter's.
        data: with images, and in `target` maps of classes: images of one channel whose values are the classes, counted
            from 0; pixels of values beyond the palette have none.
        palette: the classes' colours: "ade20k", "coco", how many, or `(classes, 3)`.
        shown: number of the row of `train_split` that shows the task.
        **options: of `Painter.from_pretrained`.

    Raises:
        ValueError: the model paints nothing, or no row can be read.
    """
    classes = len(palette_of(palette))

    def known(image: Image.Image) -> np.ndarray:
        values = one_channel(image)
        return np.where(values < classes, values, -1)

    run = Run(folder, data, "semantic", shown, known, {"palette": palette}, options)
    counts, accuracies = [], []
    for found, truth in run.results():
        count = confusion(found, truth, classes)
        counts.append(np.stack([np.diag(count), count.sum(axis=1), count.sum(axis=0)]))
        accuracies.append(float(np.trace(count) / max(count.sum(), 1)))
    sums = np.stack(counts)
    report = run.report("segmentation", {"classes": classes})
    for metric, value in overlap_scores(*sums.sum(axis=0)).items():
        low, high = interval(lambda drawn, m=metric: overlap_scores(*sums[drawn].sum(axis=0))[m], len(sums))  # type: ignore[misc]
        report.results.append(Result(metric, value, low, high))
    report.add("pixel accuracy of an image", run.numbers, np.array(accuracies))
    run.name_worst(report, np.array(accuracies), "pixel accuracy")
    return report


def depth(folder: str, data: Data, *, shown: int = 0, **options: Any) -> Report:
    """Compare depths: the errors of the NYU v2 benchmark, each the mean over images; see `depth_errors`.

    Args:
        folder: a Painter's.
        data: with images, and in `target` depth maps: images of one channel, 16 bits, in millimetres, 0 where no
            depth is known.
        shown: see `segmentation`.
        **options: likewise.

    Raises:
        ValueError: the model paints nothing, or no row can be read.
    """
    run = Run(folder, data, "depth", shown, millimetres, {}, options)
    errors = [depth_errors(found / MILLIMETRES, truth / MILLIMETRES) for found, truth in run.results()]
    report = run.report("depth", {"unit": "metres"})
    for metric in errors[0]:
        report.add(metric, run.numbers, np.array([each[metric] for each in errors]))
    run.name_worst(report, np.array([-each["RMSE"] for each in errors]), "RMSE")
    return report


def restoration(folder: str, data: Data, *, painting: str = "denoise", shown: int = 0, **options: Any) -> Report:
    """Compare restored images: decibels, at most 100, and the structural similarity, each the mean over images.

    Args:
        folder: a Painter's.
        data: with damaged images, and whole ones in `target`.
        painting: how images are read: "denoise", "derain" or "low_light".
        shown: see `segmentation`.
        **options: likewise.

    Raises:
        ValueError: the model paints nothing, there is no such task, or no row can be read.
    """
    if painting not in RESTORATIONS:
        raise ValueError(f"painting {painting!r} is none of {', '.join(RESTORATIONS)}.")
    run = Run(folder, data, painting, shown, whole_image, {}, options)
    decibels, similar = [], []
    for found, truth in run.results():
        decibels.append(min(psnr(found, truth), HIGHEST_PSNR))
        similar.append(ssim(found, truth))
    report = run.report("restoration", {"painting": painting})
    report.add("PSNR", run.numbers, np.array(decibels))
    report.add("SSIM", run.numbers, np.array(similar))
    run.name_worst(report, np.array(decibels), "PSNR")
    return report


def one_channel(image: Image.Image) -> np.ndarray:
    """Return the values of an image of one channel, `(H, W)`, int64.

    Raises:
        ValueError: it has several.
    """
    values = np.asarray(image)
    if values.ndim != 2:
        raise ValueError(f"target: an image of one channel is needed, not {image.mode}.")
    return values.astype(np.int64)


def millimetres(image: Image.Image) -> np.ndarray:
    """Return the depths of an image, `(H, W)`, int64.

    Raises:
        ValueError: it has several channels or 8 bits, or none of its depths counts.
    """
    depths = one_channel(image)
    if image.mode in ("1", "L", "P"):
        raise ValueError(f"target: depths are millimetres in 16 bits, and the image has 8 ({image.mode}).")
    if not ((depths > NEAREST * MILLIMETRES) & (depths < FARTHEST * MILLIMETRES)).any():
        raise ValueError(f"target: no depth is between {NEAREST:g} and {FARTHEST:g} metres.")
    return depths


def whole_image(image: Image.Image) -> np.ndarray:
    """Return the pixels of an image, `(H, W, 3)`, uint8.

    Raises:
        ValueError: it is smaller than a window of the structural similarity.
    """
    if min(image.size) < WINDOW:
        raise ValueError(f"target: {WINDOW} pixels in each direction are needed, not {image.width} x {image.height}.")
    return np.asarray(image.convert("RGB"))


@dataclass
class Run:
    """A Painter over the rows of a split, of which another split's row shows the task.

    Args:
        folder: the model's.
        data: with images and targets.
        task: of the processor.
        shown: number of the row that shows it, of `data.train_split`.
        annotation: what a target's image holds, for the metrics and to be painted.
        painting: options of the task.
        options: of `Painter.from_pretrained`.
        numbers: of the rows that were measured.
        errors: by row number, what is wrong with the others.
    """

    folder: str
    data: Data
    task: str
    shown: int
    annotation: Callable[[Image.Image], np.ndarray]
    painting: Mapping[str, Any]
    options: Mapping[str, Any]
    numbers: list[int] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data = replace(self.data, columns={"target": "target", **(self.data.columns or {})})
        self.painter = Painter.from_pretrained(self.folder, **self.options)
        self.rows = self.data.rows()
        self.images, self.targets = (self.data.column(self.rows, name) for name in ("image", "target"))

    def read(self, image: Any, target: Any) -> tuple[Image.Image, np.ndarray]:
        """Read an image and what its target holds."""
        upright = self.painter.processor.image_processor.upright
        return read_image(image, upright=upright), self.annotation(read_image(target, upright=upright))

    def prompt(self) -> tuple[Any, Image.Image]:
        """Return the pair that shows the task.

        Raises:
            ValueError: the split has no such row, or its target shows nothing.
        """
        whole = replace(self.data, limit=None)
        rows = whole.rows(self.data.train_split)
        check_integer("shown", self.shown, 0, len(rows) - 1)
        row = rows[self.shown]
        columns = [whole.column_name(rows, name) for name in ("image", "target")]
        try:
            image, truth = self.read(*(row[column] for column in columns if column is not None))
        except UNREADABLE as error:
            raise ValueError(f"Row {self.shown} of {self.data.train_split}, which shows the task: {error}") from error
        if self.task in RESTORATIONS:
            return image, Image.fromarray(truth)
        return self.painter.prompt(image, truth, self.task, **self.painting)

    def results(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Paint the images that can be read -> what is found and what is true, of each of `numbers`.

        Raises:
            ValueError: there is none.
        """
        prompt, batch = self.prompt(), list[tuple[int, Image.Image, np.ndarray]]()
        for number in range(len(self.rows)):
            try:
                image, truth = self.read(self.images[number], self.targets[number])
                if truth.shape[:2] != (image.height, image.width):
                    raise ValueError(f"target is {truth.shape[:2]}, the image {(image.height, image.width)}.")
                batch.append((number, image, truth))
            except UNREADABLE as error:
                self.errors[number] = str(error)
            if batch and (len(batch) == BATCH or number + 1 == len(self.rows)):
                found = self.painter([image for _, image, _ in batch], prompt, task=self.task, **self.reading())
                self.numbers += [number for number, _, _ in batch]
                yield from ((np.asarray(each), truth) for each, (_, _, truth) in zip(found, batch, strict=True))
                batch = []
        check_any(self.numbers, self.errors)

    def reading(self) -> dict[str, Any]:
        return {"batch_size": BATCH, **self.painting}

    def report(self, name: str, protocol: Mapping[str, Any]) -> Report:
        """Begin the report of what was measured."""
        known = {"split": self.data.split, "shown by": f"row {self.shown} of {self.data.train_split}", **protocol}
        report = Report(name, self.folder, self.data.dataset, len(self.numbers), known, errors=self.errors)
        report.about = self.data.about(self.rows, ["image", "target"], self.painter.model)
        return report

    def name_worst(self, report: Report, scores: np.ndarray, metric: str) -> None:
        """Add the images of the lowest scores to a report."""
        for i in np.argsort(scores, kind="stable")[:MOST_MISTAKES].tolist():
            text = f"{metric} {abs(float(scores[i])):.3f}"
            report.mistakes.append(Mistake(path_of(self.images[self.numbers[i]]), text))
