"""PaLI's mixture of tasks (https://arxiv.org/abs/2209.06794, section 3.3): rows of eight kinds to one kind of batch.

Each task is a prompt, with `{...}` where a row's fields belong, and an answer. The words of the prompts are settings:
the paper describes the tasks, and no code of it was released.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

import numpy as np

from hfvlm.checks.messages import shown
from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.media.errors import MediaError
from hfvlm.media.images import read_image
from hfvlm.processing.grounding import annotated_box

# mT5's sentinel, where the answer belongs.
GAP = "<extra_id_0>"
PROMPTS: Mapping[str, str] = {
    "split_captioning": "Generate the alt_text in {language} at {position}: {begin} " + GAP,
    "captioning": "Generate the alt_text in {language} at 0: " + GAP,
    "ocr": "Generate the ocr_text in {language}: " + GAP,
    "vqa": "Answer in EN: {question} " + GAP,
    "vqg": "Generate a question in {language} for {answer}: " + GAP,
    "object_aware": "Answer in EN: {question} " + GAP,
    "detection": "detect: " + GAP,
}
# Questions about the objects of an image: all of them, one, and which of several.
LISTING = "List the objects present"
PRESENCE = "Is {thing} in the image?"
CHOICE = "Which of {things} are in the image?"
Pair = tuple[Any, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Corruption:
    """How mT5 leaves out spans of a text (https://arxiv.org/abs/1910.10683, section 3.1.4).

    Args:
        share: of the tokens that are left out.
        length: of a span, on average.
    """

    share: float = 0.15
    length: float = 3.0

    def spans(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Choose the tokens, of `count`, that are left out -> booleans; the first is kept, and spans do not touch."""
        out = min(max(round(count * self.share), 1), count - 1)
        spans = min(max(round(out / self.length), 1), out, count - out)
        lengths = [_parts(total, spans, random) for total in (count - out, out)]
        marks = [mark for kept, left in zip(*lengths, strict=True) for mark in [False] * kept + [True] * left]
        return np.array(marks)

    def __call__(
        self, ids: Sequence[int], sentinels: Sequence[int], end: int, random: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """Corrupt the ids of a text -> the inputs and the labels, each with its end token.

        Args:
            ids: of the text, without special tokens.
            sentinels: that stand for the first span, the second, and so on.
            end: the end token.
            random: of the spans.

        Raises:
            ValueError: the text has fewer than two tokens, or more spans than there are sentinels.
        """
        if len(ids) < 2:
            raise ValueError(f"a text of {len(ids)} tokens has none that could be left out")
        left = self.spans(len(ids), random)
        first = left & ~np.concatenate([[False], left[:-1]])
        if first.sum() > len(sentinels):
            raise ValueError(f"{int(first.sum())} spans are left out, and there are {len(sentinels)} sentinels")
        marks = iter(sentinels)
        inputs, labels = list[int](), list[int]()
        for i, token in enumerate(ids):
            if first[i]:
                mark = next(marks)
                inputs.append(mark)
                labels.append(mark)
            (labels if left[i] else inputs).append(token)
        return [*inputs, end], [*labels, end]


def _parts(total: int, count: int, random: np.random.Generator) -> list[int]:
    """Divide `total` into `count` parts of at least one, each division equally likely."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff([0, *cuts, total]).tolist()


class MixtureCollator:
    """Collates rows of several tasks to `input_ids`, `attention_mask`, `labels` and `pixel_values`.

    A row names its "task", and has next to "image":

    - "span_corruption": "text"; it has no image.
    - "split_captioning", "captioning": "text", and "language", which is "EN" if it is missing.
    - "ocr": "texts", in their order, and "language".
    - "vqa": "question" and "answer".
    - "vqg": "question", its "language", and "answer".
    - "object_aware": "objects", names; and "absent", names of what is not there.
    - "detection": "objects", each a "label" and a "box", left, top, right and bottom in pixels.

    A field that is None is missing, as data sets have it of other tasks' fields. What is drawn for a row depends on
    the seed and on how many rows there were before.

    Args:
        processor: PaLI's.
        prompts: in place of those of `PROMPTS`, by task.
        corruption: of texts.
        max_length: tokens of a text that is corrupted; what follows is cut.
        seed: of spans, splits, questions and orders.

    Raises:
        ValueError: a prompt for a task that there is not, or with a field that its rows have not; a number is out of
            its range.
    """

    def __init__(
        self,
        processor: Any,
        prompts: Mapping[str, str] | None = None,
        *,
        corruption: Corruption | None = None,
        max_length: int = 512,
        seed: int = 0,
    ):
        if unknown := sorted(set(prompts or {}) - set(PROMPTS)):
            raise ValueError(f"prompts: no task is called {', '.join(unknown)}; there are {', '.join(PROMPTS)}.")
        self.processor, self.prompts = processor, {**PROMPTS, **(prompts or {})}
        self.corruption, self.max_length = corruption or Corruption(), max_length
        check_integer("max_length", max_length, 2)
        check_integer("seed", seed, 0)
        for task, prompt in self.prompts.items():
            check_prompt(task, prompt)
        check_number("corruption.share", self.corruption.share, 0, 1)
        check_number("corruption.length", self.corruption.length, 1, 1000)
        self.random = np.random.default_rng(seed)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Make a batch.

        Raises:
            ValueError: a row without a known task, or without a field of its task; the message names it.
        """
        examples = [self.example(row, f"row {i}") for i, row in enumerate(rows)]
        return self.processor.training_batch(examples)

    def example(self, row: Row, name: str = "row") -> tuple[Any, list[int], list[int]]:
        """Make the image (or None), the encoder's ids and the decoder's labels of a row."""
        row = {field: value for field, value in row.items() if value is not None}
        task = row.get("task")
        if task == "span_corruption":
            return None, *self.corrupted(row, name)
        make = TASKS.get(str(task))
        if make is None:
            known = ", ".join(("span_corruption", *TASKS))
            raise ValueError(f"{name}: task must be one of {known}, not {shown(task)}.")
        try:
            image = read_image(row["image"])
            fields, answer = make({**row, "image": image}, self.random, self.processor)
            fields = {"language": text_in(row, "language") if "language" in row else "EN"} | fields
        except KeyError as error:
            raise ValueError(f"{name}: a row of the task {task!r} needs {shown(error.args[0])}.") from error
        except MediaError:
            raise
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        prompt = self.prompts[str(task)].format(**fields)
        return image, self.processor.encode(f"{self.processor.image_token}{prompt}"), self.processor.answer_ids(answer)

    def corrupted(self, row: Row, name: str) -> tuple[list[int], list[int]]:
        tokenizer = self.processor.tokenizer
        if "text" not in row:
            raise ValueError(f"{name}: a row of the task 'span_corruption' needs 'text'.")
        try:
            text = text_in(row, "text")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        ids = tokenizer(text, add_special_tokens=False, padding=False)["input_ids"][: self.max_length]
        try:
            return self.corruption(ids, self.processor.sentinels, tokenizer.eos_token_id, self.random)
        except ValueError as error:
            raise ValueError(f"{name}: {error}.") from error


def check_prompt(task: str, prompt: str) -> None:
    """Refuse a prompt with fields that are not its task's, or without a place for the answer.

    Raises:
        ValueError: it is such a prompt.
    """
    known = {"language"} | {name for _, name, _, _ in Formatter().parse(PROMPTS[task]) if name}
    try:
        named = {name for _, name, _, _ in Formatter().parse(prompt) if name is not None}
    except ValueError as error:
        raise ValueError(f"prompts[{task!r}]: {error}: write {{{{ for a brace.") from error
    if unknown := sorted(named - known):
        raise ValueError(f"prompts[{task!r}]: no field {shown(unknown[0])}; there are {', '.join(sorted(known))}.")
    if GAP not in prompt:
        raise ValueError(f"prompts[{task!r}]: has no {GAP}, where the answer belongs.")


def text_in(row: Row, field: str) -> str:
    """Return a text of a row or of an object in it.

    Raises:
        KeyError: there is none.
        ValueError: it is something else, or empty.
    """
    if not isinstance(row[field], str) or not row[field].strip():
        raise ValueError(f"{field!r} is a text, not {shown(row[field])}.")
    return row[field]


def list_in(row: Row, field: str, kind: type) -> list[Any]:
    """Return a list of a row, of texts or of objects.

    Raises:
        KeyError: there is none.
        ValueError: it is something else, or has something else in it.
    """
    values = row[field]
    if not isinstance(values, list | tuple) or not all(isinstance(value, kind) for value in values):
        what = "texts" if kind is str else "objects, each a label and a box"
        raise ValueError(f"{field!r} is a list of {what}, not {shown(values)}.")
    return list(values)


def _split(row: Row, random: np.random.Generator, processor: Any) -> Pair:
    """A beginning of the caption, and its rest; the position counts letters."""
    words = text_in(row, "text").split(" ")
    cut = int(random.integers(0, len(words)))
    begin = " ".join(words[:cut])
    return {"begin": begin, "position": len(begin)}, " ".join(words[cut:])


def _caption(row: Row, random: np.random.Generator, processor: Any) -> Pair:
    return {}, text_in(row, "text")


def _read(row: Row, random: np.random.Generator, processor: Any) -> Pair:
    return {}, " ".join(list_in(row, "texts", str))


def _answer(row: Row, random: np.random.Generator, processor: Any) -> Pair:
    return {"question": text_in(row, "question")}, text_in(row, "answer")


def _ask(row: Row, random: np.random.Generator, processor: Any) -> Pair:
    return {"answer": text_in(row, "answer")}, text_in(row, "question")


def _objects(row: Row, random: np.random.Generator, processor: Any) -> Pair:
    """One of three kinds of questions; those about single objects are as often about one that is absent."""
    present, absent = list_in(row, "objects", str), list_in({"absent": (), **row}, "absent", str)
    kind = int(random.integers(0, 3)) if present and absent else 0
    if kind == 0:
        return {"question": LISTING}, ", ".join(present) or "none"
    if kind == 1:
        there = bool(random.integers(0, 2))
        thing = random.choice(present if there else absent)
        return {"question": PRESENCE.format(thing=thing)}, "yes" if there else "no"
    things = [*random.permutation(present)[:3], *random.permutation(absent)[:3]]
    order = [str(things[i]) for i in random.permutation(len(things))]
    chosen = [thing for thing in order if thing in present]
    return {"question": CHOICE.format(things=", ".join(order))}, ", ".join(chosen)


def _detect(row: Row, random: np.random.Generator, processor: Any) -> Pair:
    """All boxes in an order by chance, as Pix2Seq (https://arxiv.org/abs/2109.10852)."""
    size = read_image(row["image"]).size
    objects = list_in(row, "objects", Mapping)
    found = [(text_in(each, "label"), annotated_box(each["box"], size)) for each in objects]
    order = [found[int(i)] for i in random.permutation(len(found))]
    return {}, " ; ".join(processor.grounding_text(label, [box], size) for label, box in order)


TASKS: Mapping[str, Callable[[Row, np.random.Generator, Any], Pair]] = {
    "split_captioning": _split,
    "captioning": _caption,
    "ocr": _read,
    "vqa": _answer,
    "vqg": _ask,
    "object_aware": _objects,
    "detection": _detect,
}


def mixed(sources: Mapping[str, Sequence[Row]], weights: Mapping[str, float], *, seed: int = 0) -> Iterator[Row]:
    """Draw rows without end: a source by its weight, then one of its rows, for `IterableDataset.from_generator`.

    Args:
        sources: the rows of each task, by its name, which they need not have themselves.
        weights: of each source.
        seed: of what is drawn.

    Raises:
        ValueError: sources and weights have other names, a weight is negative or no number, or a source that is drawn
            from has no rows.
    """
    for name, weight in weights.items():
        check_number(f"weights[{name!r}]", weight, 0)
    if set(sources) != set(weights) or not sum(weights.values()):
        raise ValueError(f"weights {dict(weights)}: each of {', '.join(sources)} has one, none below 0, not all 0.")
    if empty := [name for name, rows in sources.items() if weights[name] and not len(rows)]:
        raise ValueError(f"sources: {', '.join(empty)}: no rows.")
    random = np.random.default_rng(seed)
    names = list(sources)
    shares = np.array([weights[name] for name in names], dtype=float)
    while True:
        name = names[random.choice(len(names), p=shares / shares.sum())]
        yield {"task": name, **sources[name][int(random.integers(len(sources[name])))]}
