"""Checkpoints that are made of others: adapters merged into the weights they adapt, differences added to theirs."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hfvlm.checkpoints import CheckpointError
from hfvlm.checks.messages import shown

_ADAPTER = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight")


def merge_lora(
    base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """`W + scale * B @ A` for every layer that a PEFT adapter names; the other tensors as they are.

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
    merged = dict(base)
    for key, half in halves.items():
        ranks = {name: matrix.shape[:1] if name == "A" else matrix.shape[1:] for name, matrix in half.items()}
        if ranks != {"A": (rank,), "B": (rank,)} or half["A"].ndim != 2:
            raise CheckpointError(f"adapter: {shown(key)} has no lora_A and lora_B of rank {rank}.")
        change = half["B"].float() @ half["A"].float()
        if change.shape != base[key].shape:
            raise CheckpointError(
                f"adapter: {shown(key)} is {tuple(change.shape)}, the base's {tuple(base[key].shape)}: the wrong base."
            )
        merged[key] = (base[key].float() + scale * change).to(base[key].dtype)
    return merged


def add_delta(base: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that were released as their difference to a base.

    Tensors that the base lacks are whole in `delta`; a table with more rows than the base's has whole rows at its end.

    Raises:
        CheckpointError: the base has what the delta lacks, or another shape: it is the wrong one.
    """
    # Rotary frequencies are computed, and some files repeat them; a difference of two is zero.
    base, delta = ({k: t for k, t in part.items() if not k.endswith(".inv_freq")} for part in (base, delta))
    missing = sorted(set(base) - set(delta))
    if missing:
        raise CheckpointError(f"base: {len(missing)} tensors are not in the delta, the first is {shown(missing[0])}.")
    return {key: _add(key, base[key], tensor) if key in base else tensor for key, tensor in delta.items()}


def with_average_rows(table: Tensor, count: int) -> Tensor:
    """`(V, D)` -> `(V + count, D)`. As an output layer's, the new rows' logits are as good as the average token's, and
    so never the largest."""
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(count, -1)])


def _add(key: str, base: Tensor, delta: Tensor) -> Tensor:
    rows = len(base) if base.ndim else 0
    if delta.ndim != base.ndim or delta.shape[1:] != base.shape[1:] or len(delta) < rows:
        raise CheckpointError(
            f"delta: {shown(key)} is {tuple(delta.shape)}, the base's {tuple(base.shape)}: the wrong base."
        )
    added = (delta[:rows].float() + base.float()).to(delta.dtype)
    return torch.cat([added, delta[rows:]]) if len(delta) > rows else added
