"""Recipes as files: YAML 1.2's plain values, `field=value` changes, and the checks of every field."""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from hfvlm.training.failures import check_values

CPU = "on_cpu"
MOST_WORKERS = 8
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# Old names, which some versions of transformers still have and others warn about.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: 5e-4 is a number, `no` and 2026-11-30 are texts, a key stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 (PyYAML's)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_OURS = ("bool", "int", "float", "timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in _OURS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _decimal(loader: Any, node: Any) -> int:
    return int(loader.construct_scalar(node).replace("_", ""), 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def parse_yaml(text: str) -> Any:
    """Parse YAML 1.2.

    Raises:
        ValueError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise ValueError(f"not YAML ({error}).") from error


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe's fields, with those of `on_cpu` where there is no accelerator, and with the changes.

    Args:
        path: of the YAML file.
        changes: "field=value" or, of a mapping, "field.key=value".

    Raises:
        ValueError: the file is no recipe, or a change is no `field=value`; naming the file.
    """
    try:
        recipe = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(recipe, dict) or not all(isinstance(name, str) for name in recipe):
        raise ValueError(f"{path}: a recipe is a list of `field: value`.")
    changed: dict[str, Any] = {}
    for change in changes:
        name, separator, value = change.partition("=")
        if not separator or not name:
            raise ValueError(f"{change!r}: changes are written as field=value.")
        name, _, key = name.partition(".")
        if key:
            before = changed.get(name, recipe.get(name)) or {}
            changed[name] = {**(before if isinstance(before, dict) else {}), key: value_of(change, value)}
        else:
            changed[name] = value_of(change, value)
    smaller = changed.pop(CPU, recipe.pop(CPU, None)) or {}
    if not isinstance(smaller, dict):
        raise ValueError(f"{path}: {CPU} is a list of `field: value`, for machines without an accelerator.")
    return recipe | (smaller if runs_on_cpu(recipe | changed) else {}) | changed


def value_of(change: str, text: str) -> Any:
    """Parse the value of a change: YAML, but a path that is typed without quotes is taken whole.

    Raises:
        ValueError: a list or a mapping is not YAML.
    """
    try:
        value = parse_yaml(text)
    except ValueError as error:
        if text.lstrip().startswith(("[", "{", "'", '"')):
            raise ValueError(f"{change!r}: {error}") from error
        return text
    return text if isinstance(value, str) and not text.lstrip().startswith(("'", '"')) else value


def runs_on_cpu(recipe: Mapping[str, Any]) -> bool:
    """Decide whether a recipe runs without an accelerator, by its choice or because there is none."""
    return bool(as_switch(recipe.get("use_cpu", False))) or torch.accelerator.current_accelerator() is None


def as_switch(value: Any) -> Any:
    """Convert yes, no, on, off, true and false, in upper or lower case, to a boolean; leave anything else."""
    return WORDS.get(value.lower(), value) if isinstance(value, str) else value


def checked(recipe: Mapping[str, Any], kinds: Iterable[Any]) -> dict[str, Any]:
    """Convert fields to the arguments' types; `auto` is decided by the device.

    Args:
        recipe: fields and values.
        kinds: the dataclasses that share the fields among them.

    Raises:
        ValueError: an unknown field, a value of another type, or one out of its range; naming the field.
    """
    types = {kind: typing.get_type_hints(kind) for kind in kinds}
    hints = {field.name: known[field.name] for kind, known in types.items() for field in dataclasses.fields(kind)}
    cpu = runs_on_cpu(recipe)
    if cpu and not as_switch(recipe.get("use_cpu", False)) and as_switch(recipe.get("bf16")) is True:
        raise ValueError("bf16 is on, and this machine has no accelerator: write bf16=auto, or use_cpu=true.")
    found: dict[str, Any] = {"dataloader_pin_memory": False} if cpu and "dataloader_pin_memory" in hints else {}
    for name, value in recipe.items():
        name = RENAMED[name] if RENAMED.get(name) in hints else name
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            raise ValueError(f"there is no field {name!r}." + (f" Did you mean {near[0]}?" if near else ""))
        found[name] = typed(name, decided(name, value, cpu=cpu), hints[name])
    check_values(found)
    return found


def decided(name: str, value: Any, *, cpu: bool) -> Any:
    """Resolve `auto` for this machine."""
    if value != "auto":
        return value
    if name == "bf16":
        return not cpu and (torch.accelerator.current_accelerator() != torch.device("cuda") or has_bf16())
    if name == "dataloader_num_workers":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        return min(MOST_WORKERS, share - 1)
    return value


def has_bf16() -> bool:
    """Check whether the GPU computes in bfloat16 natively."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def typed(name: str, value: Any, hint: Any) -> Any:
    """Convert a value to a field's type.

    Raises:
        ValueError: it cannot be.
    """
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = {typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if union else (hint,))}
    if value is None:
        if type(None) not in kinds:
            raise ValueError(f"{name} needs a value.")
        return None
    if name.endswith("_strategy") and as_switch(value) is False:
        return "no"
    if bool in kinds and isinstance(as_switch(value), bool):
        return as_switch(value)
    if kinds & {int, float}:
        return number(name, value, whole=float not in kinds) if not kinds & {str, dict} else value
    if list in kinds and str not in kinds and not isinstance(value, list):
        return [value]
    return plain(name, value, kinds)


def plain(name: str, value: Any, kinds: set[Any]) -> Any:
    """Check a text, a mapping or a boolean.

    Raises:
        ValueError: it is of another type.
    """
    if kinds - {type(None)} == {str} and not isinstance(value, str):
        if isinstance(value, bool | dict | list):
            raise ValueError(f"{name} is {value!r}; it must be a text.")
        return str(value)
    if kinds - {type(None)} == {bool}:
        raise ValueError(f"{name} is {value!r}; it must be true or false.")
    if kinds - {type(None)} == {dict} and not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}; it must be a mapping, as {{name: value}}.")
    return value


def number(name: str, value: Any, *, whole: bool) -> int | float:
    """Convert a value to a finite number.

    Raises:
        ValueError: it is none, or has a fraction where there must be none.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{name} is {value!r}; it must be a number.")
    if not whole:
        return value if isinstance(value, int) else found
    if found != int(found):
        raise ValueError(f"{name} is {value!r}; it must be a whole number.")
    return value if isinstance(value, int) else int(found)
