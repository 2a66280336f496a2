"""CLIPScore and RefCLIPScore: how well captions fit images, by a model that embeds both.

Hessel et al. 2021 (https://arxiv.org/abs/2104.08718; jmhessel/clipscore at 1036465). Values compare only between
evaluations by the same model: the paper's are of CLIP ViT-B/32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hfvlm.evaluation.data import Data, check_any, read_texts
from hfvlm.evaluation.report import MOST_MISTAKES, Mistake, Report
from hfvlm.inference.embedder import Embedder
from hfvlm.media.rows import path_of

# The factor that stretches CLIP's cosines to about 0 to 1, and what every text begins with.
WEIGHT = 2.5
PREFIX = "A photo depicts "


def clip_scores(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """Return CLIPScore of each caption: 2.5 times its cosine with the image, or 0 where that is negative.

    Args:
        images: `(N, D)`, of unit length.
        captions: `(N, D)`, of unit length.
    """
    return WEIGHT * np.maximum((images * captions).sum(axis=1), 0)


def ref_clip_scores(scores: np.ndarray, captions: np.ndarray, references: Sequence[np.ndarray]) -> np.ndarray:
    """Return RefCLIPScore of each caption: the harmonic mean of its CLIPScore and of its cosine with the nearest
    reference, or 0 where that is negative.

    Args:
        scores: `(N,)`, of `clip_scores`.
        captions: `(N, D)`, of unit length.
        references: for each caption `(R, D)`, of unit length.
    """
    nearest = np.array([max(float((own @ text).max()), 0.0) for own, text in zip(references, captions, strict=True)])
    sums = scores + nearest
    return np.divide(2 * scores * nearest, sums, out=np.zeros_like(sums), where=sums > 0)


def clip_score(folder: str, data: Data, **options: Any) -> Report:
    """Score given captions of images.

    Args:
        folder: of a model that embeds images and texts.
        data: with images and either candidates, one a row, and, if there are any, texts as their references; or texts
            alone, each of which is scored.
        **options: of `Embedder.from_pretrained`.

    Raises:
        ValueError: the model has other modalities, the data lack a column, or no row can be read.
    """
    rows = data.rows()
    judge = Judge(Embedder.from_pretrained(folder, **options))
    images = data.column(rows, "image")
    candidates, references, errors = captions_and_references(data, rows)
    numbers = [row for row, own in candidates.items() for _ in own]
    texts = [text for own in candidates.values() for text in own]
    found, wrong = judge([images[row] for row in numbers], texts, [references[row] for row in numbers])
    errors |= {numbers[i]: error for i, error in wrong.items()}
    report = Report("clip-score", folder, data.dataset, len(set(numbers) - set(errors)), errors=errors)
    report.protocol = {"prefix": PREFIX.strip(), "captions": len(numbers), "split": data.split}
    columns = [name for name in ("image", "candidate", "text") if data.column_name(rows, name)]
    report.about = data.about(rows, columns, judge.embedder.model)
    add_scores(report, found, numbers)
    scores = found["CLIPScore"]
    worst = sorted(scores, key=lambda i: scores[i])[:MOST_MISTAKES]
    report.mistakes = [Mistake(path_of(images[numbers[i]]), f"{texts[i]} ({scores[i]:.3f})") for i in worst]
    return report


def captions_and_references(
    data: Data, rows: Any
) -> tuple[dict[int, list[str]], dict[int, list[str]], dict[int, str]]:
    """Return by row number the captions to be scored and their references, none without candidates; and what is wrong
    with the rows that have no captions."""
    if data.column_name(rows, "candidate") is None:
        texts, errors = read_texts(data.column(rows, "text"))
        check_any(texts, errors)
        return texts, {row: [] for row in texts}, errors
    candidates, errors = read_texts(data.column(rows, "candidate"))
    check_any(candidates, errors)
    if data.column_name(rows, "text") is None:
        return candidates, {row: [] for row in candidates}, errors
    references, missing = read_texts(data.column(rows, "text"))
    both = {row: own for row, own in candidates.items() if row in references}
    check_any(both, errors | missing)
    return both, references, dict(sorted((missing | errors).items()))


class Judge:
    """The scores of captions by one model.

    Args:
        embedder: of a model with images and texts, a vector each.
    """

    def __init__(self, embedder: Embedder):
        embedder.check(["image", "text"])
        embedder.check_one_vector("CLIPScore")
        self.embedder = embedder

    def __call__(
        self, images: Sequence[Any], captions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[dict[str, dict[int, float]], dict[int, str]]:
        """Score captions.

        Args:
            images: one for each caption.
            captions: `N` texts.
            references: for each caption, none or several.

        Returns:
            By metric and position the scores of the captions whose image can be read, RefCLIPScore where every caption
            has references; by position what is wrong with the other images.

        Raises:
            ValueError: no image can be read.
        """
        vectors, readable, errors = self.embedder.encode_known("image", images)
        check_any(readable, errors)
        texts = self.embed([captions[i] for i in readable])
        scores = {"CLIPScore": clip_scores(vectors.numpy(), texts)}
        if all(references):
            ends = np.cumsum([len(references[i]) for i in readable])[:-1]
            own = np.split(self.embed([text for i in readable for text in references[i]]), ends)
            scores["RefCLIPScore"] = ref_clip_scores(scores["CLIPScore"], texts, own)
        return {name: dict(zip(readable, own.tolist(), strict=True)) for name, own in scores.items()}, errors

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts after the prefix that the paper has, `(N, D)`."""
        return self.embedder.encode(text=[PREFIX + text for text in texts])


def add_scores(report: Report, scores: Mapping[str, Mapping[int, float]], numbers: Sequence[int]) -> None:
    """Add scores, which are by position, to a report; `numbers` are the positions' rows."""
    for name, own in scores.items():
        report.add(name, [numbers[i] for i in own], np.array(list(own.values())))
