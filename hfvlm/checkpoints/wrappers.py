"""What training and saving put around a model's tensors and their names, and how it comes off."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import logging

from hfvlm.checkpoints.errors import CheckpointError
from hfvlm.checkpoints.pickles import Inert, Stored
from hfvlm.checks.messages import listed

logger = logging.get_logger(__name__)

# Moving averages, which are taken where a file holds nothing else.
AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema")
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", *AVERAGES)
# What torch.compile, FSDP and activation checkpointing put between a module and its name: no module is called so.
_MARKS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Where a pickled module has its state.
_MEMBERS = ("_parameters", "_buffers", "_modules")


def unwrapped(path: Path, tree: Any) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Unwrap the tensors inside whatever the authors saved around them, by name, and the rest.

    Raises:
        CheckpointError: there are no tensors, or they have no names.
    """
    if isinstance(tree, Inert):
        return _checked(path, dict(_module_tensors(tree)), tree.attributes), {}
    extras: dict[str, Any] = {}
    while isinstance(tree, Mapping):
        inner = _inner(path, tree)
        if inner is None:
            break
        extras |= {name: value for name, value in tree.items() if name != inner}
        tree = tree[inner]
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{path}: holds a {_kind(tree)}, not a mapping of names to tensors.")
    tensors = {key: value for key, value in tree.items() if isinstance(value, Stored)}
    extras |= {key: value for key, value in tree.items() if key not in tensors}
    return _checked(path, tensors, tree), {key: _plain(value) for key, value in extras.items()}


def _checked(path: Path, tensors: dict[Any, Stored], tree: Mapping[Any, Any]) -> dict[str, Stored]:
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; its entries are {listed(tree, 8)}.")
    if nameless := [key for key in tensors if not isinstance(key, str)]:
        raise CheckpointError(f"{path}: {len(nameless)} of its tensors have no names, the first is {nameless[0]!r}.")
    return tensors


def _inner(path: Path, tree: Mapping[Any, Any]) -> str | None:
    """Find the wrapper that leads to tensors; of several the first in the order above, with a warning."""
    found = [name for name in WRAPPERS if _leads_to_tensors(tree.get(name))]
    if len(found) > 1:
        logger.warning(f"{path}: holds weights in {listed(found)}; took {found[0]!r}.")
    return found[0] if found else None


def _leads_to_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and (
        any(isinstance(item, Stored) for item in value.values())
        or any(_leads_to_tensors(value.get(name)) for name in WRAPPERS)
    )


def _kind(tree: Any) -> str:
    return "Tensor" if isinstance(tree, Stored) else type(tree).__name__


def _module_tensors(module: Inert, prefix: str = "") -> Iterator[tuple[str, Stored]]:
    """Yield tensors of a TorchScript module or of a pickled one, named as its `state_dict()` would."""
    attributes = module.attributes
    if all(isinstance(attributes.get(kind), Mapping) for kind in _MEMBERS):
        fleeting = attributes.get("_non_persistent_buffers_set")
        fleeting = fleeting if isinstance(fleeting, set) else set()
        members = (item for kind in _MEMBERS for item in attributes[kind].items())
        attributes = {name: value for name, value in members if name not in fleeting}
    for name, value in attributes.items():
        if isinstance(value, Stored):
            yield f"{prefix}{name}", value
        elif isinstance(value, Inert):
            yield from _module_tensors(value, f"{prefix}{name}.")


def _plain(value: Any) -> Any:
    """Return what was stored beside the tensors, with inert objects as the dictionaries of their attributes."""
    if isinstance(value, Inert):
        return {name: _plain(item) for name, item in value.attributes.items()}
    return value


class Renamed(Mapping[str, Tensor]):
    """Tensors under other names; both are given."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]):
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def without_marks(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors by the names they had before torch.compile, DDP, FSDP or an averaged model wrapped the model.

    `module.` comes off where every name has it. Where two names would become one, all stay as they are.
    """
    names = {name: ".".join(part for part in name.split(".") if part not in _MARKS) for name in tensors}
    averaged = {name for name in names.values() if name != "n_averaged"}
    while averaged and all(name.startswith("module.") for name in averaged):
        names = {old: new.removeprefix("module.") for old, new in names.items() if new != "n_averaged"}
        averaged = set(names.values())
    if all(old == new for old, new in names.items()) and len(names) == len(tensors):
        return tensors
    return tensors if len(set(names.values())) < len(names) or "" in names.values() else _renamed(tensors, names)


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor] | None:
    """Return the tensors by their names without `prefix`, if all have it; None otherwise."""
    if not tensors or not all(name.startswith(prefix) and name != prefix for name in tensors):
        return None
    return without_marks(_renamed(tensors, {name: name.removeprefix(prefix) for name in tensors}))


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Renamed:
    return Renamed(tensors, {new: old for old, new in names.items()})
