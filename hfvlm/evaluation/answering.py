"""VQA accuracy as the VQA challenge counts it (https://visualqa.org/evaluation.html)."""

import re
from collections.abc import Sequence
from itertools import chain, combinations

AGREEING = 3
ARTICLES = {"a", "an", "the"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate(NUMBERS)}}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# What people type without apostrophes.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've she's should've shouldn't shouldn't've somebody'd
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that'd that'd've that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
""".split()  # noqa: SIM905 (a list of a hundred lines is no clearer)


def _spellings() -> dict[str, str]:
    """Map the spellings that leave out some of a contraction's apostrophes to the contraction."""
    found: dict[str, str] = {}
    for word in CONTRACTIONS:
        marks = [i for i, letter in enumerate(word) if letter == "'"]
        for left_out in chain.from_iterable(combinations(marks, n) for n in range(1, len(marks) + 1)):
            found["".join(letter for i, letter in enumerate(word) if i not in left_out)] = word
    return found


SPELLINGS = _spellings()
# A period that is not within a number; a comma within one.
_PERIOD = re.compile(r"(?<!\d)\.(?!\d)|(?<=\d)\.(?!\d)|(?<!\d)\.(?=\d)")
_COMMA = re.compile(r"\d,\d")


def normalised(answer: str) -> str:
    """Strip an answer of case, punctuation, articles and number words, and restore its apostrophes."""
    text = re.sub(r"[\n\t]", " ", answer).strip()
    commas = _COMMA.search(text) is not None
    for mark in PUNCTUATION:
        outside = f"{mark} " in text or f" {mark}" in text
        text = text.replace(mark, "" if outside or commas else " ")
    text = _PERIOD.sub("", text)
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(SPELLINGS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean over questions; an answer is right, 1, when three of the other nine annotators gave it.

    Args:
        answers: one a question.
        references: the annotators' answers to each question, ten of them in VQA.

    Raises:
        ValueError: the numbers differ, or a question has no references.
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(f"{len(answers)} answers need {len(answers)} lists of references, not {len(references)}.")
    return sum(map(accuracy_of, answers, references)) / len(answers)


def accuracy_of(answer: str, given: Sequence[str]) -> float:
    """Score one question: the mean, over leaving out each annotator, of how many others agree with it, in thirds."""
    if not given:
        raise ValueError(f"{answer!r} has no references to be compared with.")
    # Where all annotators agree, the challenge compares their answers as they are.
    same = len(set(given)) == 1
    wanted = list(given) if same else [normalised(text) for text in given]
    found = answer.replace("\n", " ").replace("\t", " ").strip() if same else normalised(answer)
    matches = [text == found for text in wanted]
    if len(given) == 1:
        return float(matches[0])
    return sum(min(1.0, (sum(matches) - match) / AGREEING) for match in matches) / len(matches)
