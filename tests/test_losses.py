"""Losses against their definitions; the originals' values and gradients are in the goldens."""

import pytest
import torch
from torch.nn import functional as F

from hfvlm.losses import contrastive_loss, sigmoid_loss


@pytest.fixture
def pairs():
    return [F.normalize(torch.randn(6, 8, dtype=torch.float64), dim=-1) for _ in range(2)]


def test_contrastive_loss_is_infonce_in_both_directions(pairs):
    a, b = pairs
    logits = 10.0 * a @ b.t()
    forward = -torch.stack([logits[i, i] - logits[i].logsumexp(0) for i in range(6)]).mean()
    backward = -torch.stack([logits[i, i] - logits[:, i].logsumexp(0) for i in range(6)]).mean()
    assert torch.allclose(contrastive_loss(a, b, torch.tensor(10.0)), (forward + backward) / 2)


def test_sigmoid_loss_judges_each_pair(pairs):
    a, b = pairs
    logits = 10.0 * a @ b.t() - 5.0
    each = [-torch.log(torch.sigmoid(logits[i, j] if i == j else -logits[i, j])) for i in range(6) for j in range(6)]
    assert torch.allclose(sigmoid_loss(a, b, torch.tensor(10.0), torch.tensor(-5.0)), torch.stack(each).sum() / 6)


def test_perfect_pairs_cost_nothing():
    eye = torch.eye(5)
    assert contrastive_loss(eye, eye, torch.tensor(100.0)) < 1e-6
    assert sigmoid_loss(eye, eye, torch.tensor(100.0), torch.tensor(-50.0)) < 1e-6


def test_label_smoothing_raises_the_price_of_certainty():
    eye = torch.eye(5)
    assert contrastive_loss(eye, eye, torch.tensor(100.0), label_smoothing=0.1) > 1


def test_rows_must_pair_up(pairs):
    a, b = pairs
    for loss in (lambda: contrastive_loss(a, b[:3], 1.0), lambda: sigmoid_loss(a, b[:3], 1.0, 0.0)):
        with pytest.raises(ValueError, match=r"compares row i with row i, but got \(6, 8\) and \(3, 8\)"):
            loss()
