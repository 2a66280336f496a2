"""Against definitions, pixel by pixel."""

import numpy as np
import pytest

from hfvlm.evaluation.painting import confusion, depth_errors, psnr, segmentation_scores, ssim

RANDOM = np.random.default_rng(0)


def test_psnr():
    image = np.full((4, 4), 100)
    assert psnr(image, image + 10) == pytest.approx(20 * np.log10(255 / 10))
    assert psnr(image, image) == float("inf")
    assert psnr(image / 255, (image + 10) / 255, highest=1) == pytest.approx(psnr(image, image + 10))


@pytest.mark.parametrize("gaussian", [False, True])
def test_ssim(gaussian):
    """The mean over windows, each by itself."""
    left = RANDOM.integers(0, 256, (13, 15)).astype(float)
    right = (left + RANDOM.normal(0, 40, left.shape)).clip(0, 255)
    width = 11 if gaussian else 7
    line = np.exp(-((np.arange(width) - width // 2) ** 2) / (2 * 1.5**2)) if gaussian else np.ones(width)
    weights = np.outer(line, line) / np.outer(line, line).sum()
    factor = 1 if gaussian else width**2 / (width**2 - 1)
    found = []
    for i in range(13 - width + 1):
        for j in range(15 - width + 1):
            a, b = (x[i : i + width, j : j + width] for x in (left, right))
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb, cov = (factor * (weights * x).sum() for x in ((a - ma) ** 2, (b - mb) ** 2, (a - ma) * (b - mb)))
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            found.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert ssim(left, right, gaussian=gaussian) == pytest.approx(np.mean(found), abs=1e-9)
    both = ssim(np.stack([left, left], axis=-1), np.stack([right, left], axis=-1), gaussian=gaussian)
    assert both == pytest.approx((np.mean(found) + 1) / 2, abs=1e-9)


def test_segmentation():
    truth = np.array([[0, 0, 1, 1], [2, -1, 255, 1]])
    found = np.array([[0, 1, 1, 1], [2, 0, 0, 3]])
    scores = segmentation_scores(confusion(found, truth, 4))
    assert scores["pixel accuracy"] == pytest.approx(4 / 6)
    assert scores["mean IoU"] == pytest.approx((1 / 2 + 2 / 4 + 1 + 0) / 4)
    assert scores["mean accuracy"] == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    with pytest.raises(ValueError, match="Classes of 4 to 4 were found, of 4"):
        confusion(np.array([4]), np.array([0]), 4)


def test_depths():
    truth, found = np.array([1.0, 2.0, 4.0, 0.0, 20.0]), np.array([1.1, 3.0, 4.0, 5.0, 5.0])
    errors = depth_errors(found, truth)
    assert errors["delta 1"] == pytest.approx(2 / 3)
    assert errors["delta 2"] == pytest.approx(1)
    assert errors["abs rel"] == pytest.approx((0.1 + 0.5) / 3)
    assert errors["sq rel"] == pytest.approx((0.01 + 0.5) / 3)
    assert errors["RMSE"] == pytest.approx(np.sqrt((0.01 + 1) / 3))
    logs = np.log([1.1, 1.5, 1.0])
    assert errors["RMSE log"] == pytest.approx(np.sqrt((logs**2).mean()))
    assert errors["log10"] == pytest.approx(np.abs(logs).mean() / np.log(10))
    assert errors["SILog"] == pytest.approx(100 * logs.std())


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="must have the same shape"):
        psnr(np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="at least 7 pixels"):
        ssim(np.zeros((6, 9)), np.zeros((6, 9)))
    with pytest.raises(ValueError, match=r"No true depth is between 0\.001 and 10"):
        depth_errors(np.ones(3), np.zeros(3))
