"""The loss of pairs of answers, against what a calculator says."""

import math

import pytest
import torch

from hfvlm.losses import preference_loss


def test_the_loss_is_that_of_bradley_and_terry():
    chosen, rejected = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 3.0])
    # -log 1 / (1 + exp(-d)) for d = 1, 0 and -4
    expected = (0.3132616875 + 0.6931471806 + 4.0181499279) / 3
    assert preference_loss(chosen, rejected).item() == pytest.approx(expected, abs=1e-6)
    assert preference_loss(chosen + 7, rejected + 7).item() == pytest.approx(expected, abs=1e-6)
    # d = 0, -1 and -4
    margin = torch.tensor([1.0, 1.0, 0.0])
    expected = (0.6931471806 + 1.3132616875 + 4.0181499279) / 3
    assert preference_loss(chosen, rejected, margin).item() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_is_the_probability_of_the_wrong_order():
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in ([2.0, -1.0], [1.0, 3.0]))
    preference_loss(chosen, rejected).backward()
    wrong = [1 / (1 + math.exp(d)) / 2 for d in (1.0, -4.0)]
    assert chosen.grad.tolist() == pytest.approx([-p for p in wrong], abs=1e-7)
    assert rejected.grad.tolist() == pytest.approx(wrong, abs=1e-7)
    assert preference_loss(torch.tensor([-1e4]), torch.tensor([1e4])).item() == 2e4  # no infinity


def test_half_precision_is_computed_in_full():
    chosen, rejected = torch.tensor([1.0]), torch.tensor([1.0078125])
    assert preference_loss(chosen.bfloat16(), rejected.bfloat16()).item() == preference_loss(chosen, rejected).item()


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((2, 1), (2, 1)), ((0,), (0,))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="preference_loss needs scores of one shape"):
        preference_loss(*(torch.zeros(shape) for shape in shapes))
