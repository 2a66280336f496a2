"""The evaluation of models that find what a text names: boxes against those that people drew."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hfvlm.evaluation.data import Data, check_any, read_texts
from hfvlm.evaluation.generating import generate_each
from hfvlm.evaluation.report import MOST_MISTAKES, Mistake, Report, Result
from hfvlm.inference.captioner import Captioner
from hfvlm.media.images import read_image
from hfvlm.media.rows import UNREADABLE, path_of
from hfvlm.processing.grounding import Grounding, annotated_box, intersection_over_union

# A box is right from this overlap on, as RefCOCO counts (https://arxiv.org/abs/1608.00272).
RIGHT = 0.5
Box = Sequence[float]


def grounding(folder: str, data: Data, *, generate: Mapping[str, Any] | None = None, **options: Any) -> Report:
    """Compare the box in each answer with the one that was drawn; an answer without a box overlaps nothing.

    Args:
        folder: the model's, such as Shikra's, Qwen-VL's or PaliGemma's.
        data: with images, texts (one expression or several) and a box for each image: left, top, right and bottom in
            pixels of the image as it is shown.
        generate: options of `generate`.
        **options: of `Captioner.from_pretrained`.

    Raises:
        ValueError: the model finds no boxes, or no row can be read.
    """
    rows = data.rows()
    images = data.column(rows, "image")
    texts, errors = read_texts(data.column(rows, "text"))
    boxes, sizes, wrong = read_boxes(data.column(rows, "box"), images)
    errors |= wrong
    generate = dict(generate or {"max_new_tokens": 64})
    captioner = Captioner.from_pretrained(folder, **options)
    processor = captioner.processor
    if not isinstance(processor, Grounding):
        raise ValueError(
            f"{folder}: {type(captioner.model).__name__} finds no boxes; Shikra, Qwen-VL and PaliGemma do."
        )
    asked = [(row, text) for row, own in texts.items() if row in boxes for text in own]
    check_any(asked, errors)
    prompts = {i: processor.locating(text) for i, (_, text) in enumerate(asked)}
    answers, unread = generate_each(captioner, [images[row] for row, _ in asked], prompts, {}, generate)
    errors |= {asked[i][0]: error for i, error in unread.items()}
    numbers = [asked[i][0] for i in answers]
    found = [processor.answered_box(answer, sizes[asked[i][0]]) for i, answer in answers.items()]
    pairs = zip(found, numbers, strict=True)
    scores = np.array([0.0 if box is None else intersection_over_union(box, boxes[row]) for box, row in pairs])
    protocol = generate | {"split": data.split, "expressions": len(numbers)}
    report = Report("grounding", folder, data.dataset, len(numbers), protocol, errors=dict(sorted(errors.items())))
    report.about = data.about(rows, ["image", "text", "box"], captioner.model)
    report.add("accuracy@0.5", numbers, scores >= RIGHT)
    report.add("mean IoU", numbers, scores)
    share = float(np.mean([box is not None for box in found]))
    report.results.append(Result("answers with a box", share, n=len(found)))
    order = list(answers)
    worst = [order[i] for i in np.argsort(scores, kind="stable")[:MOST_MISTAKES].tolist() if scores[i] < RIGHT]
    report.mistakes = [Mistake(path_of(images[asked[i][0]]), f"{asked[i][1]}: {answers[i]}") for i in worst]
    return report


def read_boxes(
    values: Sequence[Any], images: Sequence[Any]
) -> tuple[dict[int, Box], dict[int, tuple[int, int]], dict[int, str]]:
    """Return, by row number, the boxes of a column, their images' widths and heights, and what is wrong with the rows
    without a box.

    Args:
        values: of the column.
        images: of the rows, in which the boxes are.
    """
    found, sizes, errors = dict[int, Box](), dict[int, tuple[int, int]](), dict[int, str]()
    for row, (value, image) in enumerate(zip(values, images, strict=True)):
        try:
            size = read_image(image).size
            found[row], sizes[row] = annotated_box(value, size), size
        except UNREADABLE as error:
            errors[row] = str(error)
    return found, sizes, errors
