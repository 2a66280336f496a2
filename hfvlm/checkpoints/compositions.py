"""Checkpoints that are made of others: adapters merged into the weights they adapt, deltas added to theirs.

What they return is read and computed tensor by tensor, as it is taken.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hfvlm.checkpoints.errors import CheckpointError
from hfvlm.checkpoints.saving import LazyTensors
from hfvlm.checks.messages import shown

_ADAPTER = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight")


def merge_lora(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LazyTensors:
    """Merge `W + scale * B @ A` for every layer that a PEFT adapter names; the other tensors stay as they are.

    Args:
        base: state dict of the adapted model, in the names of `adapter` without their `base_model.model.`.
        adapter: of `adapter_model.bin` or `.safetensors`.
        settings: of `adapter_config.json`.

    Raises:
        CheckpointError: a tensor of the adapter has no counterpart, or the adapter is of a kind that is not merged.
    """
    unsupported = [
        name for name in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern") if settings.get(name)
    ]
    if unsupported or settings.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"adapter_config.json: {settings.get('peft_type')} with {unsupported} cannot be merged.")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.items():
        match = _ADAPTER.fullmatch(key)
        if match is None or f"{match[1]}.weight" not in base:
            raise CheckpointError(f"adapter: {shown(key)} adapts no weight of the base.")
        halves.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"adapter_config.json: r {shown(rank)}, lora_alpha {shown(alpha)}: no rank and scale.")
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    merged: dict[str, Callable[[], Tensor]] = {}
    for key, half in halves.items():
        ranks = {name: matrix.shape[:1] if name == "A" else matrix.shape[1:] for name, matrix in half.items()}
        if ranks != {"A": (rank,), "B": (rank,)} or half["A"].ndim != 2:
            raise CheckpointError(f"adapter: {shown(key)} has no lora_A and lora_B of rank {rank}.")
        shape, wanted = (len(half["B"]), half["A"].shape[1]), tuple(base[key].shape)
        if shape != wanted:
            raise CheckpointError(f"adapter: {shown(key)} is {shape}, the base's {wanted}: the wrong base.")
        merged[key] = partial(_merged, base, key, half, scale)
    return LazyTensors.of(base) | LazyTensors(merged)


def _merged(base: Mapping[str, Tensor], key: str, half: Mapping[str, Tensor], scale: float) -> Tensor:
    weight = base[key]
    change = half["B"].float() @ half["A"].float()
    return change.mul_(scale).add_(weight.float()).to(weight.dtype)


def add_delta(base: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> LazyTensors:
    """Add weights that were released as their delta to a base.

    Tensors that the base lacks are whole in `delta`; a table with more rows than the base's has whole rows at its end.

    Raises:
        CheckpointError: the base has what the delta lacks, or another shape: it is the wrong one.
    """
    # Rotary frequencies are computed, and some files repeat them; a delta of two is zero.
    known, given = ([key for key in part if not key.endswith(".inv_freq")] for part in (base, delta))
    missing = sorted(set(known) - set(given))
    if missing:
        raise CheckpointError(f"base: {len(missing)} tensors are not in the delta, the first is {shown(missing[0])}.")
    for key in known:
        _check_delta(key, base[key], delta[key])
    return LazyTensors.of(delta, given) | LazyTensors({key: partial(_added, base, delta, key) for key in known})


def _check_delta(key: str, base: Tensor, delta: Tensor) -> None:
    rows = len(base) if base.ndim else 0
    if delta.ndim != base.ndim or delta.shape[1:] != base.shape[1:] or (base.ndim and len(delta) < rows):
        raise CheckpointError(
            f"delta: {shown(key)} is {tuple(delta.shape)}, the base's {tuple(base.shape)}: the wrong base."
        )


def _added(base: Mapping[str, Tensor], delta: Mapping[str, Tensor], key: str) -> Tensor:
    first, second = base[key], delta[key]
    if second.shape == first.shape:
        return (second.float() + first.float()).to(second.dtype)
    whole = second.clone()
    whole[: len(first)] = second[: len(first)].float() + first.float()
    return whole


def lengthened(tensors: Mapping[str, Tensor], names: Iterable[str], size: int) -> LazyTensors:
    """Give the tables `names` `size` rows; see `with_average_rows`."""

    def longer(name: str) -> Tensor:
        table = tensors[name]
        return with_average_rows(table, size - len(table)) if len(table) < size else table

    return LazyTensors.of(tensors) | LazyTensors({name: partial(longer, name) for name in names})


def with_average_rows(table: Tensor, count: int) -> Tensor:
    """Append average rows: `(V, D)` -> `(V + count, D)`. As an output layer's, their logits are as good as the average
    token's, and so never the largest."""
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(count, -1)])
