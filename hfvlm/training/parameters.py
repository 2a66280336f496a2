"""The trained parameters of towers, and their learning rates."""

from collections.abc import Mapping, Sequence

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
    """Give the parameters of towers groups with their own learning rates; the weight decay stays."""
    rate_of = {p: rates[name] for name, tower in towers.items() for p in tower.parameters()}
    groups = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_rate.setdefault(rate_of.get(parameter, group["lr"]), []).append(parameter)
        groups += [group | {"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
    optimizer.param_groups = groups
