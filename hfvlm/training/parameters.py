"""The trained parameters of towers, and their learning rates."""

from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from hfvlm.modules.dropout import PatchDropout
from hfvlm.training.lora import towers


def tower_modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return towers by their short names, as "vision".

    Raises:
        ValueError: the model has no such tower.
    """
    known = towers(model)  # type: ignore[arg-type]
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"{type(model).__name__} has no tower {', '.join(unknown)}; it has {', '.join(known)}.")
    return {name: model.get_submodule(known[name]) for name in names}


def set_patch_dropout(model: nn.Module, rate: float) -> None:
    """Set the rate of every vision tower.

    Raises:
        ValueError: no tower has patches to leave out.
    """
    parts = [module for module in model.modules() if isinstance(module, PatchDropout)]
    if not parts:
        raise ValueError(f"patch_dropout: {type(model).__name__} has no tower that can leave patches out.")
    for part in parts:
        part.rate = rate


def split_by_tower(optimizer: Optimizer, towers: Mapping[str, nn.Module], rates: Mapping[str, float]) -> None:
    """Give the parameters of towers groups with their own learning rates; the weight decay stays, and so do the shares
    of `decay_by_layer`."""
    rate_of = {p: rates[name] for name, tower in towers.items() for p in tower.parameters()}
    base = optimizer.defaults["lr"]
    split_groups(optimizer, lambda p, rate: rate_of[p] * (rate / base if base else 1) if p in rate_of else rate)


def decay_by_layer(optimizer: Optimizer, towers: Mapping[str, nn.Module], rates: Mapping[str, float]) -> None:
    """Multiply the learning rates of towers' layers: the last layer's by the tower's rate, and each before it once
    more, and so what comes before the first (BEiT, https://arxiv.org/abs/2106.08254, appendix). What follows the last
    layer keeps the whole.

    Raises:
        ValueError: a tower has no list of layers, or several of the same kind.
    """
    share: dict[nn.Parameter, float] = {}
    for name, tower in towers.items():
        numbers, depth = layer_numbers(tower, name)
        share |= {parameter: rates[name] ** (depth + 1 - number) for parameter, number in numbers.items()}
    split_groups(optimizer, lambda p, rate: rate * share.get(p, 1.0))


def layer_numbers(tower: nn.Module, name: str) -> tuple[dict[nn.Parameter, int], int]:
    """Number a tower's parameters: 0 before the first layer, then by layer from 1; and return the number of layers.
    What comes after the last layer has the number after it.

    Raises:
        ValueError: there is no list of layers, or several of the same kind, as in stages.
    """
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len({*map(type, m)}) == 1]
    layers = max(lists, key=len, default=None)
    if layers is None or len([m for m in lists if type(m[0]) is type(layers[0])]) > 1:
        raise ValueError(f"layer_decay: the {name} tower ({type(tower).__name__}) has no single list of layers.")
    inside = {parameter: i + 1 for i, layer in enumerate(layers) for parameter in layer.parameters()}
    every = list(tower.parameters())
    last = max(i for i, parameter in enumerate(every) if parameter in inside)
    depth = len(layers)
    return {p: inside.get(p, 0 if i < last else depth + 1) for i, p in enumerate(every)}, depth


def split_groups(optimizer: Optimizer, rate_of: Callable[[nn.Parameter, float], float]) -> None:
    """Split an optimizer's groups by the learning rate of each parameter, given it and its group's."""
    groups = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_rate.setdefault(rate_of(parameter, group["lr"]), []).append(parameter)
        groups += [group | {"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
    optimizer.param_groups = groups
