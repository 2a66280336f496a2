"""Object hallucination: whether a model affirms objects that an image has not, by questions with yes or no.

POPE, Li et al. 2023 (https://arxiv.org/abs/2305.10355; RUCAIBox/POPE at 3df3ba1).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfvlm.checks.ranges import check_integer
from hfvlm.evaluation.data import Data
from hfvlm.evaluation.generating import generate_each
from hfvlm.evaluation.report import MOST_MISTAKES, Mistake, Report
from hfvlm.inference.captioner import Captioner
from hfvlm.media.rows import path_of

SUBSETS = ("random", "popular", "adversarial")
QUESTION = "Is there a {} in the image?"
# Questions of an image about objects that it has, and as many about others.
POSITIVES = 3
YES, NO = "yes", "no"
NEGATIONS = {"No", "no", "not"}


@dataclass(frozen=True)
class Question:
    """A question about the image of a row.

    Args:
        row: its number.
        text: the question.
        answer: "yes" or "no".
        subset: how the object of a "no" was chosen, one of SUBSETS, or what the data call it; None without subsets.
    """

    row: int
    text: str
    answer: str
    subset: str | None = None


def hallucination(
    folder: str,
    data: Data,
    *,
    question: str = QUESTION,
    generate: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """Ask a model about objects, and count its right answers, with each subset of the questions by itself.

    Args:
        folder: the model's, of one that generates answers.
        data: with images and either questions, answers ("yes" or "no") and, if there are any, subsets; or the objects
            of each image, a list of names, from which `object_questions` makes questions.
        question: of objects, with a `{}` where their names go.
        generate: options of `generate`.
        **options: of `Captioner.from_pretrained`.

    Raises:
        ValueError: the data have neither questions nor objects, or no row can be read.
    """
    rows = data.rows()
    images = data.column(rows, "image")
    asked, errors, columns = questions_of(data, rows, question)
    generate = dict(generate or {"max_new_tokens": 10})
    captioner = Captioner.from_pretrained(folder, **options)
    prompts = {i: captioner.processor.asked(each.text) for i, each in enumerate(asked)}
    answers, unread = generate_each(captioner, [images[each.row] for each in asked], prompts, {}, generate)
    errors |= {asked[i].row: error for i, error in unread.items()}
    asked = [asked[i] for i in answers]
    given = np.array([answer_of(text) == YES for text in answers.values()])
    truth = np.array([each.answer == YES for each in asked])
    protocol = generate | {"split": data.split, "questions": len(asked)}
    protocol |= {"question": question} if "objects" in columns else {}
    report = Report(
        "hallucination", folder, data.dataset, len({each.row for each in asked}), protocol,
        errors=dict(sorted(errors.items())),
    )  # fmt: skip
    report.about = data.about(rows, ["image", *columns], captioner.model)
    numbers = np.array([each.row for each in asked])
    for subset, chosen in subsets_of(asked).items():
        add_answers(report, subset, numbers[chosen], given[chosen], truth[chosen])
    texts = list(answers.values())
    wrong = sorted(np.flatnonzero(given != truth).tolist(), key=lambda i: not given[i])[:MOST_MISTAKES]
    report.mistakes = [Mistake(path_of(images[asked[i].row]), f"{asked[i].text} {texts[i]}") for i in wrong]
    return report


def questions_of(data: Data, rows: Any, question: str) -> tuple[list[Question], dict[int, str], list[str]]:
    """Return the questions of the rows, what is wrong with the rows without any, and the columns they are from."""
    if data.column_name(rows, "question") is None and data.column_name(rows, "objects") is not None:
        asked, errors = object_questions(data.column(rows, "objects"), question=question, seed=data.seed)
        return asked, errors, ["objects"]
    names = [name for name in ("question", "answer", "subset") if name != "subset" or data.column_name(rows, name)]
    columns = [data.column(rows, name) for name in names]
    asked, errors = [], {}
    for row, (text, answer, *subset) in enumerate(zip(*columns, strict=True)):
        known = str(answer).strip().lower()
        if isinstance(text, str) and known in (YES, NO):
            asked.append(Question(row, text, known, subset[0] if subset else None))
        else:
            errors[row] = f"a question with the answer yes or no is needed, not {text!r} with {answer!r}."
    if not asked:
        raise ValueError(f"{data.dataset}: no row has a question; row 0: {errors.get(0, 'there are none')}")
    return asked, errors, names


def object_questions(
    objects: Sequence[Sequence[str] | None],
    *,
    count: int = POSITIVES,
    question: str = QUESTION,
    seed: int = 0,
) -> tuple[list[Question], dict[int, str]]:
    """Make questions about the objects of images, half of them about objects that are not there, as POPE's authors.

    In each of SUBSETS an image has `count` questions about its first objects, and as many about others: drawn from all
    objects of the data ("random"), the most frequent ("popular"), or those that most often occur together with the
    object that was asked about before ("adversarial").

    Args:
        objects: the names of the objects of each image; an object that is named twice counts once.
        count: number of objects of an image that are asked about.
        question: with a `{}` where the name goes; an "a" before it becomes "an" where the name begins with a vowel.
        seed: of what is drawn.

    Returns:
        The questions, and by row number what is wrong with the images that have none: fewer objects than `count`.

    Raises:
        ValueError: the question has not one `{}`, an image has nearly all objects, or no image has enough.
    """
    check_integer("count", count)
    if question.count("{}") != 1:
        raise ValueError(f"question {question!r}: needs one {{}}, where the name of an object goes.")
    own = {row: list(dict.fromkeys(names or ())) for row, names in enumerate(objects)}
    errors = {
        row: f"objects: {count} are needed, not {len(names)}." for row, names in own.items() if len(names) < count
    }
    images = {row: names for row, names in own.items() if row not in errors}
    if not images:
        raise ValueError(f"No image has {count} objects to be asked about.")
    candidates = candidates_of(images, check_integer("seed", seed, 0))
    found = []
    for subset in SUBSETS:
        for row, names in images.items():
            used: set[str] = set(names)
            for name in names[:count]:
                absent = next((other for other in candidates[subset](name) if other not in used), None)
                if absent is None:
                    raise ValueError(
                        f"Row {row}: has all objects but {len(used) - len(names)}; {count} others are needed."
                    )
                used.add(absent)
                found.append(Question(row, asked_about(question, name), YES, subset))
                found.append(Question(row, asked_about(question, absent), NO, subset))
    return found, errors


def candidates_of(images: Mapping[int, Sequence[str]], seed: int) -> dict[str, Callable[[str], Iterator[str]]]:
    """Return, by subset, what yields objects to ask about after a present one, the preferred first and then all in a
    random order."""
    random = np.random.default_rng(seed)
    counts = Counter(name for names in images.values() for name in names)
    together: dict[str, Counter[str]] = {name: Counter() for name in counts}
    for names in images.values():
        for name in names:
            together[name].update(other for other in names if other != name)
    vocabulary, by_count = list(counts), [name for name, _ in counts.most_common()]

    def drawn(_: str) -> Iterator[str]:
        yield from (vocabulary[i] for i in random.permutation(len(vocabulary)).tolist())

    def popular(_: str) -> Iterator[str]:
        yield from by_count

    def adversarial(present: str) -> Iterator[str]:
        yield from (name for name, _ in together[present].most_common())
        yield from drawn(present)

    return dict(zip(SUBSETS, (drawn, popular, adversarial), strict=True))


def asked_about(question: str, name: str) -> str:
    """Return the question about an object, with the article that its name takes."""
    article = re.compile(r"\b([Aa]) (?=\{\})")
    return (article.sub(r"\1n ", question) if name[:1].lower() in "aeiou" else question).replace("{}", name)


def answer_of(text: str) -> str:
    """Read an answer as POPE's authors do: "no" where the first sentence has "no", "No" or "not", else "yes"."""
    words = text.strip().split(".")[0].replace(",", "").split()
    return NO if NEGATIONS & set(words) else YES


def subsets_of(asked: Sequence[Question]) -> dict[str | None, np.ndarray]:
    """Return which questions are in each subset, and which in all (None)."""
    names = [name for name in dict.fromkeys(each.subset for each in asked) if name is not None]
    known = sorted(names, key=lambda name: SUBSETS.index(name) if name in SUBSETS else len(SUBSETS))
    found: dict[str | None, np.ndarray] = {name: np.array([each.subset == name for each in asked]) for name in known}
    return found | {None: np.ones(len(asked), bool)}


def add_answers(report: Report, subset: str | None, numbers: np.ndarray, given: np.ndarray, truth: np.ndarray) -> None:
    """Add the numbers of a subset's answers: which were given, and which are right, True for yes."""
    hits = given & truth
    sums = {
        "accuracy": (given == truth, np.ones(len(given))),
        "precision": (hits, given),
        "recall": (hits, truth),
        "F1": (2 * hits, given.astype(int) + truth),
        "yes ratio": (given, np.ones(len(given))),
    }
    for name, (tops, bottoms) in sums.items():
        title = name if subset is None else f"{name} ({subset})"
        report.add_ratio(title, numbers.tolist(), tops, bottoms)
