"""The metrics of classification."""

import numpy as np
import torch

from hfvlm.checks.ranges import check_integer
from hfvlm.evaluation.retrieval import ranks_of_best


def accuracy(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Return the share of rows `(N, classes)` whose label is among the k best. Equal scores count against a row.

    Raises:
        ValueError: k is no number of classes.
    """
    check_integer("k", k)
    return float((label_ranks(scores, labels) < k).mean())


def label_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Count, `(N,)`, the other classes that score as high as the label, of `(N, classes)` scores and `(N,)` labels."""
    right = torch.from_numpy(np.eye(scores.shape[1], dtype=bool)[labels])
    return ranks_of_best(torch.from_numpy(scores), right).numpy()


def mean_per_class_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean, over the classes that occur, of the share of their rows that are right."""
    return float(np.mean([(predictions[labels == label] == label).mean() for label in np.unique(labels)]))


def mean_average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Return the mean over classes of the area under precision over recall, not interpolated.

    Args:
        scores: `(N, classes)`.
        relevant: `(N, classes)`, True where a row has a class; a row may have several. Classes that no row has are
            left out.

    Raises:
        ValueError: no row has any class.
    """
    columns = [j for j in range(relevant.shape[1]) if relevant[:, j].any()]
    if not columns:
        raise ValueError("No row has a class.")
    return float(np.mean([average_precision(scores[:, j], relevant[:, j]) for j in columns]))


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Return the average precision of one class; rows of equal score are one threshold."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(relevant[order])
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    precision, recall = hits[ends] / (ends + 1), hits[ends] / hits[-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def confusion(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Count rows by their true class and their predicted one: `(classes, classes)`."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    return counts
