"""Contrastive losses, forward and backward, at 512 dimensions: hfvlm's against the formulas of transformers and
open_clip.

    python -m benchmarks.losses [--quick] [--rounds 7] [--device cuda] [--output losses.json]

Memory is the growth of a fresh process.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measuring import Growth, Item, Row, Run, Size, peak_memory
from benchmarks.report import main
from hfvlm.losses import contrastive_loss, sigmoid_loss

DIM = 512


def transformers_softmax(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`clip_loss` of transformers 5."""
    logits = a @ b.t() * scale
    labels = torch.arange(len(logits), device=a.device)
    return (F.cross_entropy(logits.t(), labels) + F.cross_entropy(logits, labels)) / 2


def open_clip_softmax(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`ClipLoss` of open_clip: a product for each direction."""
    labels = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(scale * a @ b.t(), labels) + F.cross_entropy(scale * b @ a.t(), labels)) / 2


def transformers_sigmoid(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`SiglipModel`'s loss in transformers 5."""
    logits = b @ a.t() * scale + bias
    eye = torch.eye(len(logits), device=a.device)
    return -F.logsigmoid((2 * eye - torch.ones_like(logits)) * logits).sum(dim=-1).mean()


def open_clip_sigmoid(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`SigLipLoss` of open_clip."""
    labels = 2 * torch.eye(len(a), device=a.device) - 1
    return -F.logsigmoid(labels * (scale * a @ b.t() + bias)).sum() / len(a)


LOSSES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "softmax": {"hfvlm": contrastive_loss, "transformers": transformers_softmax, "open_clip": open_clip_softmax},
    "sigmoid": {"hfvlm": sigmoid_loss, "transformers": transformers_sigmoid, "open_clip": open_clip_sigmoid},
}


def rows(size: Size) -> Iterator[Item]:
    for loss, formulas in LOSSES.items():
        for count in size.pick((64,), (1024, 4096)):
            ways = {name: step(loss, name, str(count), size.device) for name in formulas}
            peaks = {name: ("benchmarks.losses", "first_step", loss, name, count) for name in formulas}
            yield Row(f"{loss}, batch of {count:,}", ways, memory=peaks if size.device == "cpu" else {})
        yield Growth(
            f"{loss}: memory with the batch",
            size.pick((4096, 8192), (4096, 8192, 16384)),
            lambda n, loss=loss: peak_memory("benchmarks.losses", "first_step", loss, "hfvlm", n),
            1.15,
        )


def step(loss: str, name: str, count: str, device: str = "cpu") -> Run:
    """Make the forward and backward pass of one of `LOSSES` -> the loss and its gradients."""
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(int(count), DIM), dim=-1).to(device).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(x, device=device, requires_grad=True) for x in (20.0, -10.0))

    def run() -> list[Tensor]:
        value = LOSSES[loss][name](a, b, scale, bias)
        return [value.detach(), *torch.autograd.grad(value, (a, b, scale))]

    return run


def first_step(loss: str, name: str, count: str) -> Run:
    """Make the same, in a process that has loaded what it needs, but has not held as much memory before."""
    step(loss, name, "64")()
    return step(loss, name, count)


if __name__ == "__main__":
    main({"losses": rows}, __doc__)
