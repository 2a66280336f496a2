"""The loss of an output layer in chunks, against the scores of all tokens at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hfvlm.losses import output_layer, output_layer_loss


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(output_layer, "FEWEST_ROWS", 3)
    monkeypatch.setattr(output_layer, "CHUNK_BYTES", 1)


def parts(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 5), (11, 5), (11,)]
    x, weight, b = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    for part in (x, weight, b):
        part.requires_grad_()
    return x, weight, b if bias else None, torch.tensor([0, 10, 3, 3, 7, 1, 2, 9])


@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients(bias):
    x, weight, b, labels = parts(bias=bias)
    assert torch.autograd.gradcheck(lambda *given: output_layer_loss(*given, labels), (x, weight, b))
    expected = F.cross_entropy(F.linear(x, weight, b), labels, reduction="sum")
    torch.testing.assert_close(output_layer_loss(x, weight, b, labels), expected)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_has_no_gradient(frozen):
    given = parts()
    given[frozen].requires_grad_(False)
    output_layer_loss(*given).backward()
    assert [part.grad is None for part in given[:3]] == [i == frozen for i in range(3)]


def test_half_precision_adds_up_in_float32():
    x, weight, b, labels = parts(torch.bfloat16)
    loss = output_layer_loss(x, weight, b, labels)
    assert loss.dtype == torch.float32
    loss.backward()
    given = [part.detach().float().requires_grad_() for part in (x, weight, b)]
    F.cross_entropy(F.linear(*given), labels, reduction="sum").backward()
    for part, expected in zip((x, weight, b), given, strict=True):
        assert part.grad.dtype == torch.bfloat16
        torch.testing.assert_close(part.grad.float(), expected.grad, rtol=2e-2, atol=2e-2)


def test_autocast():
    x, weight, b, labels = parts(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = output_layer_loss(x, weight, b, labels)
        expected = F.cross_entropy(F.linear(x, weight, b).float(), labels, reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    found.backward()
    assert weight.grad.dtype == torch.float32


def test_no_rows_and_a_second_pass():
    x, weight, b, labels = parts()
    none = output_layer_loss(x[:0], weight, b, labels[:0])
    none.backward()
    assert none == 0
    assert not weight.grad.any()
    loss = output_layer_loss(x, weight, b, labels)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * first)


def test_memory_is_that_of_a_chunk(monkeypatch):
    monkeypatch.setattr(output_layer, "CHUNK_BYTES", 4 * 1000 * 3)
    layer, x, labels = nn.Linear(4, 1000), torch.randn(300, 4), torch.randint(0, 1000, (300,))
    largest = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(part.numel() for part in (result,) if isinstance(part, torch.Tensor))
            return result

    with Sizes():
        output_layer_loss(x, layer.weight, layer.bias, labels).backward()
    assert max(largest) <= 4000
