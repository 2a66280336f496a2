"""Optimizers of very large batches, which neither torch nor transformers has."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _Layerwise(Optimizer, ABC):
    """Optimizer whose step of each tensor is rescaled to the length of the tensor itself."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; return what `closure`, which computes the gradients, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, parameter.grad, self.state[parameter], group)
        return loss

    @abstractmethod
    def move(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Move a parameter by its gradient."""


class Lamb(_Layerwise):
    """LAMB (https://arxiv.org/abs/1904.00962, algorithm 2): Adam's step, rescaled by layer. ALIGN and FILIP are
    trained with it.

    Args:
        params: parameters or groups of them.
        lr: the learning rate.
        betas: of the averages of the gradient and of its square.
        eps: added to the root of the second.
        weight_decay: added to Adam's step as a share of the weight, before it is rescaled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def move(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        state["step"] += 1
        first, second = group["betas"]
        mean, square = state["mean"].lerp_(gradient, 1 - first), state["square"]
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        step = (mean / (1 - first ** state["step"])).div_(root).add_(parameter, alpha=group["weight_decay"])
        parameter.sub_(step.mul_(group["lr"] * ratio(parameter.norm(), step.norm())))


class Lars(_Layerwise):
    """LARS (https://arxiv.org/abs/1708.03888, algorithm 1): momentum, with gradients that are rescaled by layer.
    SimCLR is trained with it, which excludes what does not decay, biases and norms, from the rescaling.

    Args:
        params: parameters or groups of them.
        lr: the learning rate.
        momentum: of the steps.
        weight_decay: added to the gradient as a share of the weight; a group without it is not rescaled.
        trust: length of a rescaled step, relative to the tensor's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    def move(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        decay, rate = group["weight_decay"], group["lr"]
        step = gradient
        if decay:
            step = gradient.add(parameter, alpha=decay)
            length = gradient.norm() + decay * parameter.norm()
            step *= ratio(group["trust"] * parameter.norm(), length)
        parameter.sub_(state["momentum"].mul_(group["momentum"]).add_(step * rate))


def ratio(length: Tensor, step: Tensor) -> Tensor:
    """Divide the length of a tensor by that of its step; 1 where either is zero."""
    return torch.where((length > 0) & (step > 0), length / step, torch.ones_like(length))


OPTIMIZERS: dict[str, type[Optimizer]] = {"lamb": Lamb, "lars": Lars}


def optimizer_of(name: str, arguments: Any) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return an optimizer's class and arguments for transformers' `Trainer(optimizer_cls_and_kwargs=...)`.

    Args:
        name: one of OPTIMIZERS.
        arguments: `transformers.TrainingArguments`.
    """
    kind = OPTIMIZERS[name]
    own = {"betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon}
    return kind, {"lr": arguments.learning_rate} | (own if kind is Lamb else {})
