"""How near painted images, maps of classes and depths are to the true ones."""

from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, uniform_filter  # type: ignore[import-untyped]

from hfvlm.checks.ranges import check_number

# Of the structural similarity (Wang et al., 2004): of the means and the deviations, as shares of the range.
K1, K2 = 0.01, 0.03
# Pixels of its windows, and of those that a Gaussian weighs.
WINDOW, WIDE_WINDOW = 7, 11
# Depths in metres that count, as for NYU v2.
NEAREST, FARTHEST = 1e-3, 10.0


def same_shapes(first: Any, second: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays in float64.

    Raises:
        ValueError: their shapes differ, or they are empty.
    """
    pair = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if pair[0].shape != pair[1].shape or not pair[0].size:
        raise ValueError(f"{pair[0].shape} and {pair[1].shape} cannot be compared: both must have the same shape.")
    return pair


def psnr(image: Any, truth: Any, *, highest: float = 255.0) -> float:
    """Return the peak signal-to-noise ratio in decibels; of equal images it is infinite.

    Args:
        image: any shape.
        truth: the same shape.
        highest: the range of values.
    """
    check_number("highest", highest, 0, open_low=True)
    left, right = same_shapes(image, truth)
    error = float(((left - right) ** 2).mean())
    return float("inf") if error == 0 else float(10 * np.log10(highest**2 / error))


def ssim(image: Any, truth: Any, *, highest: float = 255.0, gaussian: bool = False) -> float:
    """Return the structural similarity of images `(H, W)` or `(H, W, C)`, of -1 to 1: the mean over channels and over
    windows that lie within.

    Args:
        image: at least a window of 7 pixels, or of 11, in each direction.
        truth: the same shape.
        highest: the range of values.
        gaussian: weigh by a Gaussian of 1.5 pixels, as the paper (https://doi.org/10.1109/TIP.2003.819861); else
            windows of 7 pixels and sample covariances, as scikit-image by default.
    """
    check_number("highest", highest, 0, open_low=True)
    left, right = same_shapes(image, truth)
    width = WIDE_WINDOW if gaussian else WINDOW
    if left.ndim not in (2, 3) or min(left.shape[:2]) < width:
        raise ValueError(f"Images are (H, W) or (H, W, C) of at least {width} pixels, not {left.shape}.")
    if left.ndim == 3:
        channels = range(left.shape[-1])
        options: dict[str, Any] = {"highest": highest, "gaussian": gaussian}
        return float(np.mean([ssim(left[..., i], right[..., i], **options) for i in channels]))

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=3.5) if gaussian else uniform_filter(x, width)

    unbiased = 1.0 if gaussian else width**2 / (width**2 - 1)
    mean_left, mean_right = mean(left), mean(right)
    variance = unbiased * (mean(left**2) - mean_left**2 + mean(right**2) - mean_right**2)
    covariance = unbiased * (mean(left * right) - mean_left * mean_right)
    c1, c2 = (K1 * highest) ** 2, (K2 * highest) ** 2
    similar = (2 * mean_left * mean_right + c1) * (2 * covariance + c2)
    similar /= (mean_left**2 + mean_right**2 + c1) * (variance + c2)
    edge = width // 2
    return float(similar[edge:-edge, edge:-edge].mean())


def confusion(classes: Any, truth: Any, count: int) -> np.ndarray:
    """Count pixels by true class and found class, `(count, count)`; those without a true class, below 0 or from
    `count` on, do not count. Counts of several images add up.

    Raises:
        ValueError: the shapes differ, or a class that was found is none.
    """
    found, right = np.asarray(classes), np.asarray(truth)
    if found.shape != right.shape:
        raise ValueError(f"Maps of classes {found.shape} and {right.shape} must have the same shape.")
    known = (right >= 0) & (right < count)
    found, right = found[known].astype(np.int64), right[known].astype(np.int64)
    if found.size and not 0 <= found.min() <= found.max() < count:
        raise ValueError(f"Classes of {found.min()} to {found.max()} were found, of {count}, counted from 0.")
    return np.bincount(right * count + found, minlength=count**2).reshape(count, count)


def segmentation_scores(counts: np.ndarray) -> dict[str, float]:
    """Return the mean intersection over union over classes that occur or were found, the mean accuracy over those that
    occur, and the accuracy of pixels, of `confusion`."""
    return overlap_scores(np.diag(counts), counts.sum(axis=1), counts.sum(axis=0))


def overlap_scores(right: np.ndarray, occur: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Return the same of the pixels of each class, `(classes,)` each, that are right, that are of it, and that were
    found to be of it."""
    union = occur + found - right
    overlap = right[union > 0] / union[union > 0]
    return {
        "mean IoU": float(overlap.mean()) if len(overlap) else 0.0,
        "mean accuracy": float((right[occur > 0] / occur[occur > 0]).mean()) if occur.any() else 0.0,
        "pixel accuracy": float(right.sum() / max(occur.sum(), 1)),
    }


def depth_errors(depth: Any, truth: Any, *, nearest: float = NEAREST, farthest: float = FARTHEST) -> dict[str, float]:
    """Return the errors of a depth map in metres, where the true one is within the range.

    They are those of the NYU v2 benchmark (Eigen et al., https://arxiv.org/abs/1406.2283): shares within factors of
    1.25 and its powers; relative errors, plain and squared; root mean squares, plain and of logarithms; the mean
    difference of decimal logarithms; and a hundred times the deviation of the logarithms' difference.

    Raises:
        ValueError: the shapes differ, or no true depth is within the range.
    """
    check_number("nearest", nearest, 0, open_low=True)
    check_number("farthest", farthest, nearest, open_low=True)
    found, right = same_shapes(depth, truth)
    known = np.isfinite(right) & (right > nearest) & (right < farthest)
    if not known.any():
        raise ValueError(f"No true depth is between {nearest:g} and {farthest:g} metres.")
    found, right = np.nan_to_num(found[known], posinf=farthest).clip(nearest, farthest), right[known]
    factor, logs = np.maximum(right / found, found / right), np.log(found) - np.log(right)
    return {
        "delta 1": float((factor < 1.25).mean()),
        "delta 2": float((factor < 1.25**2).mean()),
        "delta 3": float((factor < 1.25**3).mean()),
        "abs rel": float((np.abs(right - found) / right).mean()),
        "sq rel": float(((right - found) ** 2 / right).mean()),
        "RMSE": float(np.sqrt(((right - found) ** 2).mean())),
        "RMSE log": float(np.sqrt((logs**2).mean())),
        "log10": float(np.abs(logs / np.log(10)).mean()),
        "SILog": float(100 * np.sqrt(max((logs**2).mean() - logs.mean() ** 2, 0.0))),
    }
