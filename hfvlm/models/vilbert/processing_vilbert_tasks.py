"""Examples of 12-in-1's tasks: what each makes of its annotations. `HfvlmViLBERTProcessor.collate` makes batches of
them.

An example is the model's inputs and `labels`, of as many rows as it takes: four of a choice among four. Each function
takes the processor and the task first.

Source: https://github.com/facebookresearch/vilbert-multi-task at f22b84a, vilbert/datasets.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hfvlm.models.vilbert.processing_vilbert import HfvlmViLBERTProcessor, Rows
from hfvlm.models.vilbert.regions import Regions, overlaps
from hfvlm.models.vilbert.tasks import DETECTED, Task

Example = dict[str, torch.Tensor]
# Classes of entailment and of GuessWhat's answers.
ENTAILMENT = {"contradiction": 0, "neutral": 1, "entailment": 2}
GUESSWHAT = {"Yes": 0, "No": 1, "N/A": 2}
CLASSES = {"pair": 2, "entailment": 3}
# Options of a question, the right one among them, and rounds of history before a question of a dialogue.
OPTIONS, HISTORY = 4, 3
# That GuessWhat's regions to point at are padded to.
CANDIDATES = 204
# A region below this overlap is none of those that are looked for.
LEAST_OVERLAP = 0.5


def classified(
    processor: HfvlmViLBERTProcessor,
    task: Task,
    text: str,
    regions: Regions,
    answers: dict[int, float],
    classes: int | None = None,
) -> Example:
    """Prepare a question, or a hypothesis, and its answers.

    Args:
        processor: the processor.
        task: VQA, Visual Genome, GQA, entailment or GuessWhat.
        text: the question.
        regions: of the image.
        answers: the share of annotators who gave each, by its number; none where no class is right.
        classes: the model's number of answers; entailment has three.
    """
    labels = soft_labels(answers, classes or CLASSES[task.kind])
    inputs = processor.inputs(task, [processor.sentence(text, task)], [processor.region_rows(regions)])
    return {**inputs, "labels": labels}


def soft_labels(answers: dict[int, float], classes: int) -> torch.Tensor:
    """Make labels `(1, classes)` of the shares of some."""
    if wrong := [answer for answer in answers if not 0 <= answer < classes]:
        raise ValueError(f"answers {wrong} are none of the model's {classes}.")
    labels = torch.zeros(1, classes)
    for answer, share in answers.items():
        labels[0, answer] = share
    return labels


def paired(
    processor: HfvlmViLBERTProcessor,
    task: Task,
    text: str,
    images: tuple[Regions, Regions],
    answers: dict[int, float],
    *,
    as_released: bool = False,
) -> Example:
    """Prepare a sentence about two images, a row for each (NLVR2); its classes are false and true.

    The original puts both images' regions behind one another, pads them, and cuts them in the middle, which is the
    same where the first has `task.regions` with its mean, as in training; with fewer, both share the first row and the
    second is empty. `as_released` does so.
    """
    rows = [processor.region_rows(each) for each in images]
    inputs = processor.inputs(task, [processor.sentence(text, task)] * 2, rows)
    if as_released:
        whole: Any = tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))
        cut = [tuple(part[i : i + task.regions] for part in whole) for i in (0, task.regions)]
        inputs = processor.inputs(task, [processor.sentence(text, task)] * 2, cut)
    return {**inputs, "labels": soft_labels(answers, CLASSES[task.kind])}


def with_truth(processor: HfvlmViLBERTProcessor, detected: Regions, truth: Regions | None) -> tuple[Rows, np.ndarray]:
    """Put annotated regions behind the detected ones -> features and locations, and boxes in pixels."""
    features, locations, boxes = (*processor.region_rows(detected), detected.with_mean()[2])
    if truth is not None:
        features = np.concatenate([features, processor.region_rows(truth)[0][1:]])
        locations, boxes = np.concatenate([locations, truth.locations]), np.concatenate([boxes, truth.boxes])
    return (features, locations), boxes


def grounded(
    processor: HfvlmViLBERTProcessor,
    task: Task,
    text: str,
    detected: Regions,
    box: Sequence[float],
    truth: Regions | None = None,
) -> Example:
    """Prepare an expression that refers to a region; labels are each region's overlap with it.

    Args:
        processor: the processor.
        task: one of RefCOCO's, or Flickr's.
        text: the expression.
        detected: regions of the image.
        box: that is meant: left, top, right, bottom, in pixels. RefCOCO's annotations have left, top, width, height.
        truth: annotated regions, which join the detected ones in training, where overlaps below 0.5 are none.
    """
    rows, boxes = with_truth(processor, detected, truth)
    shares = overlaps(boxes, box)
    if truth is not None:
        shares = np.where(shares < LEAST_OVERLAP, 0, shares)
    labels = torch.zeros(1, task.regions)
    kept = min(len(shares), task.regions)
    labels[0, :kept] = torch.from_numpy(shares[:kept])
    return {**processor.inputs(task, [processor.sentence(text, task)], [rows]), "labels": labels}


def pointed(
    processor: HfvlmViLBERTProcessor,
    task: Task,
    text: str,
    detected: Regions,
    truth: Regions,
    box: Sequence[float],
    candidates: Sequence[int],
    most: int | None = None,
) -> Example:
    """Prepare a question whose answer is one of some annotated regions (Visual7W, GuessWhat).

    Args:
        processor: the processor.
        task: which of the two.
        text: the question.
        detected: 100 regions of the image: the model takes those after them for the annotated ones.
        truth: annotated regions.
        box: of the answer: left, top, right, bottom, in pixels.
        candidates: numbers of annotated regions.
        most: candidates to pad to, with a region that is none; GuessWhat's are padded to `CANDIDATES`.

    Raises:
        ValueError: other than 100 detected regions, or a candidate that is none of the annotated.
    """
    if len(detected) != DETECTED - 1:
        raise ValueError(f"A question about pointing needs {DETECTED - 1} detected regions, not {len(detected)}.")
    if wrong := [each for each in candidates if not 0 <= each < len(truth)]:
        raise ValueError(f"candidates {wrong} are none of the {len(truth)} annotated regions.")
    rows, boxes = with_truth(processor, detected, truth)
    shares = overlaps(boxes, box)
    kept = min(len(shares), task.regions)
    labels = np.zeros(max(task.regions, len(shares)), dtype=np.float32)
    labels[:kept] = np.where(shares < LEAST_OVERLAP, 0, shares)[:kept]
    none = task.regions - DETECTED - 1
    chosen = (list(candidates) + [none] * (most or 0))[: most or len(candidates)]
    picked = torch.from_numpy(labels[DETECTED:][chosen]).unsqueeze(0)
    inputs = processor.inputs(task, [processor.sentence(text, task)], [rows])
    return {**inputs, "labels": picked, "candidates": torch.tensor([chosen])}


def guesswhat_text(turns: Sequence[tuple[str, str]]) -> str:
    """Write a game's questions and answers as one text."""
    return "".join(f"start {question} answer {answer} stop " for question, answer in turns)


def retrieved(
    processor: HfvlmViLBERTProcessor, task: Task, captions: Sequence[str], images: Sequence[Regions], right: int = 0
) -> Example:
    """Prepare pairs of a caption and an image, caption i with image i, of which one belongs together.

    The original's four are the pair, another caption, another image, and the caption of a similar image; see
    `retrieval_negatives`.
    """
    texts = [processor.sentence(text, task) for text in captions]
    inputs = processor.inputs(task, texts, [processor.region_rows(each) for each in images])
    return {**inputs, "labels": torch.tensor([right])}


def retrieval_negatives(
    image: Any, images: Sequence[Any], captions_of: dict[Any, Sequence[Any]], similar: Sequence[Any] | None = None
) -> tuple[Any, Any, Any]:
    """Draw a caption of another image, another image, and the caption of a similar image, by `random` and, of similar
    ones, `numpy.random`.

    Args:
        image: that of the pair.
        images: all; another one must be among them.
        captions_of: captions of each image.
        similar: images, the most similar first, which is this one; None draws any other.
    """

    def another() -> Any:
        while (drawn := random.choice(list(images))) == image:
            pass
        return drawn

    if all(each == image for each in images):
        raise ValueError("There is no other image to draw from.")
    caption = random.choice(list(captions_of[another()]))
    other = another()
    hard = another() if similar is None else similar[np.random.randint(1, len(similar))]
    return caption, other, random.choice(list(captions_of[hard]))


def reasoned(
    processor: HfvlmViLBERTProcessor,
    task: Task,
    question: Sequence[str | Sequence[int]],
    options: Sequence[Sequence[str | Sequence[int]]],
    names: Sequence[str],
    detected: Regions,
    truth: Regions,
    right: int,
) -> Example:
    """Prepare a question of VCR and its options, a row each.

    Args:
        processor: the processor.
        task: answers or rationales.
        question: words, and lists of the numbers of annotated regions; of rationales the question, "[SEP]" and the
            answer.
        options: likewise.
        names: of the annotated regions: the class, or a person's name; see `person_names`.
        detected: regions of the image.
        truth: annotated regions, which follow on the detected ones; the first features are the mean of both.
        right: number of the right option.
    """
    first = named_pieces(processor, question, names)
    room = task.text_length - 3 - len(first)
    if room < 0:
        raise ValueError(
            f"The question has {len(first)} tokens; with three more there is room for {task.text_length}."
        )
    texts = [processor.joined(first, named_pieces(processor, option, names)[:room]) for option in options]
    (features, locations), counts = processor.region_rows(detected), (len(detected) + 1, len(truth) + 1)
    annotated, places = processor.region_rows(truth)
    features[0] = (features[0] * counts[0] + annotated[0] * counts[1]) / sum(counts)
    kept = min(task.regions - 1, len(truth))
    room = min(task.regions - kept, counts[0])
    rows = (
        np.concatenate([features[:room], annotated[1 : kept + 1]]),
        np.concatenate([locations[:room], places[1 : kept + 1]]),
    )
    return {**processor.inputs(task, texts, [rows] * len(texts)), "labels": torch.tensor([right])}


def person_names(classes: Sequence[str], names: Sequence[str]) -> list[str]:
    """Draw a name for each person among regions' classes, by `random`."""
    return [random.choice(list(names)) if each == "person" else each for each in classes]


def named_pieces(
    processor: HfvlmViLBERTProcessor, words: Sequence[str | Sequence[int]], names: Sequence[str]
) -> list[int]:
    """Encode VCR's words, twice, as in training: "##ing" becomes "#", "#", "ing"."""
    spoken = [word for each in words for word in ([each] if isinstance(each, str) else [names[i] for i in each])]
    tokenizer = processor.tokenizer
    once = [tokenizer.convert_ids_to_tokens(tokenizer.pieces(word)) for word in spoken]
    return tokenizer.pieces(" ".join(piece for pieces in once for piece in pieces))


def conversed(
    processor: HfvlmViLBERTProcessor,
    task: Task,
    caption: str,
    turns: Sequence[tuple[str, str]],
    options: Sequence[Sequence[str]],
    regions: Regions,
) -> Example:
    """Prepare a dialogue about an image, a row for each option of each question.

    Args:
        processor: the processor.
        task: Visual Dialog.
        caption: of the image.
        turns: questions and their answers.
        options: of each question, the right one first; see `dialog_options`.
        regions: of the image.
    """
    pieces, sep = processor.tokenizer.pieces, processor.tokenizer.sep_token_id
    spoken = [(pieces(question), pieces(answer)) for question, answer in turns]
    texts = []
    for i, (question, _) in enumerate(spoken):
        history: list[int] = []
        for asked, answered in spoken[max(i - HISTORY, 0) : i]:
            history += [*asked, sep, *answered, sep]
        history += pieces(caption)
        for option in options[i]:
            answer = pieces(option)
            room = task.text_length - len(question) - len(answer) - 4
            if room < 0:
                raise ValueError(f"A question and an answer have {-room} tokens too many for {task.text_length}.")
            texts.append(processor.joined(question, answer, history[max(len(history) - room, 0) :]))
    rows = [processor.region_rows(regions)] * len(texts)
    return {**processor.inputs(task, texts, rows), "labels": torch.zeros(len(turns), dtype=torch.long)}


def dialog_options(right: int, options: int = 100, random: Any = np.random) -> list[int]:
    """Draw three wrong options of a question, by `numpy.random` or a generator of it -> their numbers, the right one
    first."""
    drawn = [int(each) for each in random.permutation(options) if each != right]
    return [right, *drawn[: OPTIONS - 1]]
