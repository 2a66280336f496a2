"""Next-token prediction from hidden states, without the scores of all tokens at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Bytes of the scores that are held at a time, in float32; and the fewest rows, for whose products a device has work.
CHUNK_BYTES = 2**25
FEWEST_ROWS = 256


def output_layer_loss(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Sum the cross-entropies of tokens whose scores are `x @ weight.T + bias`.

    The scores are computed in chunks of rows, with their gradients, which therefore cost no second computation: as
    Liger Kernel's fused linear cross-entropy (https://arxiv.org/abs/2410.10989), but in PyTorch.

    Args:
        x: `(M, D)`, hidden states.
        weight: `(V, D)`, of the output layer.
        bias: `(V,)`, or None.
        labels: `(M,)`, the token that each row is to predict.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _OutputLayerLoss.apply(x, weight, bias, labels)


class _OutputLayerLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        grads = [
            torch.empty_like(x) if for_x else None,
            torch.zeros_like(weight, dtype=wide) if for_weight else None,
            torch.zeros_like(bias, dtype=wide) if for_bias and bias is not None else None,
        ]
        total = torch.zeros((), dtype=wide, device=x.device)
        step = max(FEWEST_ROWS, CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, x.shape[0], step):
            rows = slice(start, start + step)
            logits = F.linear(x[rows], weight, bias).to(wide)
            targets = labels[rows].unsqueeze(1)
            largest, right = logits.amax(dim=1, keepdim=True), logits.gather(1, targets)
            delta = logits.sub_(largest).exp_()
            norm = delta.sum(dim=1, keepdim=True)
            total += (norm.log() + largest - right).sum()
            delta.div_(norm)
            delta.scatter_add_(1, targets, delta.new_full((1, 1), -1).expand_as(targets))
            _add_gradients(grads, rows, x, weight, delta)
        kinds = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.grads = [None if grad is None else grad.to(kind) for grad, kind in zip(grads, kinds, strict=True)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if torch._C._autograd._get_current_graph_task_keep_graph():  # with `retain_graph`, there may be another pass
            return (*(None if grad is None else grad * factor.to(grad.dtype) for grad in ctx.grads), None)
        grads, ctx.grads = ctx.grads, None
        return (*(None if grad is None else grad.mul_(factor.to(grad.dtype)) for grad in grads), None)


def _add_gradients(grads: list[Tensor | None], rows: slice, x: Tensor, weight: Tensor, delta: Tensor) -> None:
    """Add the gradients of some rows of x, of the weight and of the bias, given those of their scores."""
    for_x, for_weight, for_bias = grads
    narrow = delta.to(x.dtype)
    if for_x is not None:
        torch.mm(narrow, weight, out=for_x[rows])
    if for_weight is not None and for_weight.dtype == x.dtype:
        for_weight.addmm_(narrow.t(), x[rows])
    elif for_weight is not None:
        for_weight += narrow.t() @ x[rows]
    if for_bias is not None:
        for_bias += delta.sum(dim=0)
