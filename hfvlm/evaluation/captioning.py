"""The metrics of captions against references: BLEU, ROUGE-L and CIDEr-D, in plain Python.

Texts become words by lower case, with punctuation left out; COCO's own tools use the Penn Treebank's tokenizer, a Java
program, and may differ in rare words. METEOR needs WordNet and is not here.
"""

import re
from collections import Counter
from collections.abc import Sequence
from math import exp, log
from statistics import fmean

NGRAM = 4
# CIDEr-D's width of the penalty on differences in length, in words; ROUGE-L's weight of recall.
SIGMA, BETA = 6.0, 1.2
_WORD = re.compile(r"\w+(?:'\w+)?")

Words = list[str]


def words(text: str) -> Words:
    """Split a text into its words, in lower case."""
    return _WORD.findall(text.lower())


def check(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[Words], list[list[Words]]]:
    """Split captions and references into words.

    Raises:
        ValueError: the numbers differ, or a caption has no references.
    """
    if len(captions) != len(references) or not captions:
        raise ValueError(f"{len(captions)} captions need {len(captions)} lists of references, not {len(references)}.")
    if empty := [i for i, texts in enumerate(references) if isinstance(texts, str) or not len(texts)]:
        raise ValueError(f"Caption {empty[0]} needs a list of references, got {references[empty[0]]!r}.")
    return [words(text) for text in captions], [[words(text) for text in texts] for texts in references]


def ngrams(text: Words, size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(text[i : i + size]) for i in range(len(text) - size + 1))


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return BLEU-1 to BLEU-4 of a whole set, 0 to 1, without smoothing (Papineni et al. 2002).

    Args:
        captions: one text an image.
        references: the texts of each image.

    Raises:
        ValueError: an image has no references.
    """
    found, wanted = check(captions, references)
    length = sum(map(len, found))
    closest = sum(
        min((abs(len(text) - len(caption)), len(text)) for text in texts)[1]
        for caption, texts in zip(found, wanted, strict=True)
    )
    penalty = 1.0 if length > closest else exp(1 - closest / length) if length else 0.0
    scores, product = [], 1.0
    for size in range(1, NGRAM + 1):
        hits = total = 0
        for caption, texts in zip(found, wanted, strict=True):
            counts = ngrams(caption, size)
            most: Counter[tuple[str, ...]] = Counter()
            for text in texts:
                most |= ngrams(text, size)
            hits += sum((counts & most).values())
            total += sum(counts.values())
        product *= hits / total if total else 0.0
        scores.append(penalty * product ** (1 / size))
    return scores


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return ROUGE-L, 0 to 1: the mean over the images of F with recall weighed 1.2, of the best precision and the
    best recall of their references, as in COCO's evaluation (https://arxiv.org/abs/1504.00325).

    Arguments and errors as `bleu`.
    """
    return fmean(rouge_l_of_each(captions, references))


def rouge_l_of_each(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return ROUGE-L of each image."""
    found, wanted = check(captions, references)
    scores = []
    for caption, texts in zip(found, wanted, strict=True):
        common = [longest_common(caption, text) for text in texts]
        precision = max(common) / len(caption) if caption else 0.0
        recall = max(n / len(text) if text else 0.0 for n, text in zip(common, texts, strict=True))
        both = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / both if both else 0.0)
    return scores


def longest_common(a: Words, b: Words) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b):
            before, row[j + 1] = row[j + 1], before + 1 if word == other else max(row[j + 1], row[j])
    return row[-1]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return CIDEr-D, 0 to 10: the mean over the images of a set, whose references also define how rare an n-gram is
    (https://arxiv.org/abs/1411.5726, sections 3 and 4).

    A set of one image has no rare n-grams: its score is 0. Arguments and errors as `bleu`.
    """
    return fmean(cider_of_each(captions, references))


def cider_of_each(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return CIDEr-D of each image."""
    found, wanted = check(captions, references)
    images: Counter[tuple[str, ...]] = Counter()
    for texts in wanted:
        images.update({gram for text in texts for size in range(1, NGRAM + 1) for gram in ngrams(text, size)})
    unseen = log(len(wanted))
    rarity = {gram: unseen - log(count) for gram, count in images.items()}

    def vectors(text: Words) -> list[dict[tuple[str, ...], float]]:
        sizes = range(1, NGRAM + 1)
        return [{gram: n * rarity.get(gram, unseen) for gram, n in ngrams(text, size).items()} for size in sizes]

    scores = []
    for caption, texts in zip(found, wanted, strict=True):
        near = [
            fmean(map(clipped_cosine, vectors(caption), vectors(text)))
            * exp(-((len(caption) - len(text)) ** 2) / (2 * SIGMA**2))
            for text in texts
        ]
        scores.append(10 * fmean(near))
    return scores


def clipped_cosine(a: dict[tuple[str, ...], float], b: dict[tuple[str, ...], float]) -> float:
    """Return the cosine of two n-gram vectors, where `a` counts no n-gram more often than `b`: repeating earns
    nothing."""
    lengths = (sum(v * v for v in a.values()) * sum(v * v for v in b.values())) ** 0.5
    return sum(min(v, b[gram]) * b[gram] for gram, v in a.items() if gram in b) / lengths if lengths else 0.0
