"""Checks of what a chat model wrote."""

import re
from collections.abc import Sequence

# What each check drops.
CHECKS = {
    "format": "it has not the form that was asked for, or more questions than that",
    "cut": "the model was stopped at its limit of tokens",
    "empty": "a question or an answer is empty",
    "mentions-source": "it speaks of captions, boxes, coordinates or of what was given, instead of what is to be seen",
    "refusal": "it refuses, or speaks of itself as a language model",
    "repeated": "two questions are the same, or an answer repeats its question",
}
LINE = re.compile(r"^\s*(?:\*\*)?([QA])\s*[:.](?:\*\*)?\s*(.*?)\s*$", re.IGNORECASE)
SOURCE = re.compile(
    r"\b(captions?|(bounding )?box(es)?|coordinates?"
    r"|(the|provided|given) (descriptions?|lists?|notes?|account|information|text)"
    r"|key ?frames?|(is|are|as|was|were) (described|mentioned|listed|provided|given))\b|\[\s*[01]?\.\d+",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\b(as an ai|language model|i('m| am) (sorry|unable)"
    r"|i (can ?not|can't|do not|don't) (see|view|access|help|assist))\b",
    re.IGNORECASE,
)
Pairs = list[tuple[str, str]]


def read_pairs(text: str, most: int) -> Pairs | None:
    """Read lines "Q: ..." and "A: ..."; None for anything else, or for more than `most` pairs.

    Lines without either go on with the answer before them.
    """
    found: list[tuple[str, str]] = []
    for line in filter(str.strip, text.strip().splitlines()):
        match = LINE.match(line)
        if match:
            found.append((match[1].upper(), match[2]))
        elif found and found[-1][0] == "A":
            found[-1] = ("A", f"{found[-1][1]} {line.strip()}".strip())
        else:
            return None
    kinds = "".join(kind for kind, _ in found)
    if not found or len(found) > 2 * most or kinds != "QA" * (len(found) // 2):
        return None
    texts = [each for _, each in found]
    return list(zip(texts[::2], texts[1::2], strict=True))


def faults(pairs: Pairs, given: Sequence[str] = ()) -> list[str]:
    """Return the checks that questions with answers fail.

    Args:
        pairs: of a question and an answer.
        given: questions of ours, which are not checked.
    """
    questions = [question for question, _ in pairs if question not in given]
    answers = [answer for _, answer in pairs]
    texts = "\n".join([*questions, *answers])
    plain = [plain_words(question) for question, _ in pairs]
    found = {
        "empty": not all(re.search(r"\w", text) for pair in pairs for text in pair),
        "mentions-source": SOURCE.search(texts) is not None,
        "refusal": REFUSAL.search("\n".join(answers)) is not None,
        "repeated": len(set(plain)) < len(plain) or any(plain_words(a) == plain_words(q) for q, a in pairs),
    }
    return [name for name, failed in found.items() if failed]


def plain_words(text: str) -> str:
    """Return a text's words, to compare."""
    return " ".join(re.findall(r"\w+", text.lower()))
