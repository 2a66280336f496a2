"""Logistic regression on frozen features, as in CLIP's paper (https://arxiv.org/abs/2103.00020, appendix A.3)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.media.sources import import_extra

# The sweep begins with these and narrows down around the best, to eight steps a decade.
FIRST_CS = tuple(10.0**i for i in range(-6, 7, 2))
STEPS_PER_DECADE = 8
ITERATIONS = 1000
VALIDATION = 0.2


def fit(features: np.ndarray, labels: np.ndarray, c: float) -> Any:
    """Fit a logistic regression by L-BFGS; C is the inverse of the L2 regularisation.

    Raises:
        ValueError: C is no positive number, or a feature is not finite.
    """
    check_number("C", c, 0, open_low=True)
    import_extra("sklearn", "eval", "Linear probes")
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, max_iter=ITERATIONS).fit(features, labels)


def best_c(features: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> float:
    """Find the regularisation C that does best on a fifth of the rows, which is left out of the fits.

    Raises:
        ValueError: a class has too few rows to leave one out.
    """
    check_integer("seed", seed, 0)
    import_extra("sklearn", "eval", "Linear probes")
    from sklearn.model_selection import train_test_split

    rest, left_out, rest_labels, left_out_labels = train_test_split(
        features, labels, test_size=VALIDATION, stratify=labels, random_state=seed
    )
    found: dict[float, float] = {}

    def score(c: float) -> float:
        if c not in found:
            found[c] = fit(rest, rest_labels, c).score(left_out, left_out_labels)
        return found[c]

    best, step = max(FIRST_CS, key=score), 1.0
    while step >= 1 / STEPS_PER_DECADE:
        best = max((best * 10**-step, best, best * 10**step), key=score)
        step /= 2
    return best


def draw_shots(labels: np.ndarray, shots: int, *, seed: int) -> np.ndarray:
    """Draw row numbers, `shots` of each class.

    Raises:
        ValueError: a class has fewer rows.
    """
    random = np.random.default_rng((check_integer("seed", seed, 0), check_integer("shots", shots)))
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if fewest := [len(found) for found in rows if len(found) < shots]:
        raise ValueError(f"{shots} shots need {shots} rows of each class; one has {min(fewest)}.")
    return np.concatenate([random.choice(found, shots, replace=False) for found in rows])


def few_shot_curve(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    shots: Sequence[int],
    c: float,
    *,
    seeds: int = 3,
) -> dict[int, list[float]]:
    """Return accuracies on the test rows by the number of training rows of each class, for several draws of them."""
    check_integer("seeds", seeds)
    curve: dict[int, list[float]] = {}
    for count in shots:
        rows = [draw_shots(train[1], count, seed=seed) for seed in range(seeds)]
        curve[count] = [fit(train[0][r], train[1][r], c).score(*test) for r in rows]
    return curve
