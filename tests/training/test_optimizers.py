"""Optimizers of large batches, by hand."""

import pytest
import torch

from hfvlm.training.optimizers import Lamb, Lars


def test_lamb_by_hand():
    """Two steps of algorithm 2 on one tensor, in numbers."""
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = Lamb([weight], lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.01)
    mean = square = torch.zeros(2, dtype=torch.float64)
    expected = weight.detach().clone()
    for step, gradient in enumerate(([1.0, -2.0], [0.5, 0.0]), start=1):
        weight.grad = g = torch.tensor(gradient, dtype=torch.float64)
        mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g**2
        adam = (mean / (1 - 0.9**step)) / ((square / (1 - 0.99**step)).sqrt() + 1e-6) + 0.01 * expected
        expected = expected - 0.1 * expected.norm() / adam.norm() * adam
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)


def test_lars_by_hand():
    """What does not decay is not rescaled."""
    weight, bias = (torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = Lars(groups, lr=0.5, momentum=0.9, trust=0.01)
    weight.grad, bias.grad = torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0])
    optimizer.step()
    # A gradient of 0.3 and 2.4, times 0.01 * 5 / (2 + 0.1 * 5).
    scaled = torch.tensor([0.3, 2.4]) * 0.02 * 0.5
    torch.testing.assert_close(weight.detach(), torch.tensor([3.0, 4.0]) - scaled)
    torch.testing.assert_close(bias.detach(), torch.tensor([3.0, 3.0]))
    bias.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.tensor([3.0, 3.0 - 0.9]))


@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_they_find_a_minimum_and_go_on_from_their_state(kind):
    def run(steps, saved=None):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(5, 5) if saved is None else saved[0].clone())
        optimizer = kind([{"params": [weight], "weight_decay": 1e-4}], lr=1.0 if kind is Lars else 0.02)
        if saved is not None:
            optimizer.load_state_dict(saved[1])
        for _ in range(steps):
            optimizer.zero_grad()
            ((weight - torch.eye(5)) ** 2).sum().backward()
            optimizer.step()
        return weight.detach(), optimizer.state_dict()

    first, whole = run(60), run(120)
    torch.testing.assert_close(run(60, first)[0], whole[0])
    torch.manual_seed(0)
    begun = (torch.randn(5, 5) - torch.eye(5)).norm()
    assert (whole[0] - torch.eye(5)).norm() < 0.5 * begun


def test_a_tensor_of_zeros_moves():
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = Lamb([weight], lr=0.1)
    weight.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), -0.1), rtol=1e-4, atol=0)
