"""Contrastive batches larger than memory: gradient caching (https://arxiv.org/abs/2101.06983).

The loss of a contrastive model needs only the embeddings of the whole batch. So they are computed in mini-batches
without storing activations; the loss gives each of them its gradient; and each mini-batch is computed once more, this
time for the gradients of the weights. It takes the memory of a mini-batch and one more forward pass.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import ModelOutput

from hfvlm.checks.ranges import check_integer
from hfvlm.modeling.outputs import contrastive_fields


def cached_backward(
    model: Callable[..., ModelOutput],
    contrast: Callable[[ModelOutput], Tensor],
    inputs: Mapping[str, Any],
    mini_batch_size: int,
    *,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    unsynchronised: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Return the loss of a whole batch; add its gradients to the parameters', like
    `contrast(model(**inputs)).backward()`.

    Dropout draws the same numbers in both passes. Batch norms in training see mini-batches: with them the gradients
    are those of the mini-batches' statistics.

    Args:
        model: inputs by name -> an output with embeddings.
        contrast: an output with the embeddings of all rows -> their loss, as `DualEncoder.contrast`.
        inputs: each tensor has one row for each row of the batch.
        mini_batch_size: rows that are computed at a time.
        precision: the context of each forward pass, as automatic mixed precision.
        backward: called instead of `loss.backward()`, as accelerate's.
        unsynchronised: the context of all mini-batches but the last, as `DistributedDataParallel.no_sync`.

    Raises:
        ValueError: the inputs have different numbers of rows, or mini_batch_size is no number of rows.
    """
    check_integer("mini_batch_size", mini_batch_size)
    parts = split(inputs, mini_batch_size)
    states, found = [], []
    with torch.no_grad(), restored_statistics(model):
        for part in parts:
            states.append(RandomState.of(part))
            with precision():
                output = model(**part)
            found.append(contrastive_fields(output))
    rows = {name: torch.cat([rows[name] for rows, _ in found]) for name in found[0][0]}
    leaves = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in (rows | found[0][1]).items()}
    loss = contrast(type(output)(**leaves))
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), allow_unused=True), strict=True))

    start = 0
    for i, (part, state) in enumerate(zip(parts, states, strict=True)):
        last = i == len(parts) - 1
        with nullcontext() if last else unsynchronised():
            state.restore()
            with precision():
                own_rows, factors = contrastive_fields(model(**part))
            stop = start + len(next(iter(own_rows.values())))
            # Its gradient is that of the loss: each embedding's own gradient is passed on.
            terms = [(v, gradients[k][start:stop]) for k, v in own_rows.items() if gradients.get(k) is not None]
            if last:
                terms += [(v, zero_or(gradients.get(k), v)) for k, v in factors.items()]
            backward(sum((value * gradient.to(value.dtype)).sum() for value, gradient in terms))  # type: ignore[arg-type]
            start = stop
    return loss.detach()


def split(inputs: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    """Split a batch's inputs into parts of `size` rows; what is no tensor goes with each of them."""
    counts = {name: len(value) for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
    if len(set(counts.values())) != 1:
        raise ValueError(f"Mini-batches need inputs of one number of rows, but got {counts}.")
    starts = range(0, next(iter(counts.values())), size)
    return [{k: v[i : i + size] if k in counts else v for k, v in inputs.items()} for i in starts]


def zero_or(gradient: Tensor | None, value: Tensor) -> Tensor:
    """Return the gradient, or zeros where the loss leaves a factor out: data parallelism waits for every parameter."""
    return torch.zeros_like(value) if gradient is None else gradient


class RandomState:
    """The state of the random number generators of the CPU and of one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_cpu = torch.get_rng_state()
        self.on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> "RandomState":
        """Take the state of the device where the inputs are."""
        return cls(next(value.device for value in inputs.values() if isinstance(value, Tensor)))

    def restore(self) -> None:
        """Set the generators to the state."""
        torch.set_rng_state(self.on_cpu)
        if self.on_device is not None:
            torch.get_device_module(self.device).set_rng_state(self.on_device, self.device)


@contextmanager
def restored_statistics(model: Any) -> Iterator[None]:
    """Restore, at the end, the running statistics of batch norms."""
    norms = (m for m in model.modules() if isinstance(m, _BatchNorm)) if isinstance(model, nn.Module) else ()
    saved = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    yield
    for buffer, before in saved:
        buffer.copy_(before)
