"""Weights that GPTQ (https://arxiv.org/abs/2210.17323) quantized, as AutoGPTQ packs them (https://github.com/AutoGPTQ/AutoGPTQ
at v0.7.1, `auto_gptq/nn_modules/qlinear/qlinear_cuda.py`), become plain ones."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hfvlm.checkpoints.errors import CheckpointError
from hfvlm.checkpoints.saving import LazyTensors
from hfvlm.checks.messages import shown

PACKED, REST = "qweight", ("qzeros", "scales", "g_idx")
# Whole numbers of codes fill an int32.
BITS = (2, 4, 8)
# What the formats store less than each zero point.
OFFSETS = {"gptq": 1, "gptq_v2": 0}


def dequantized(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], biased: Collection[str]) -> LazyTensors:
    """Return the state dict before it was quantized, each `weight` computed when it is taken, in its scales' type.

    Args:
        tensors: of each linear layer `qweight` `(in * bits / 32, out)` and `qzeros` `(groups, out * bits / 32)`, both
            int32, `scales` `(groups, out)` and `g_idx` `(in,)`; other tensors stay as they are.
        settings: `quantization_config` of config.json.
        biased: ends of the names of layers that have a bias. AutoGPTQ writes one, of zeros, for the others.

    Raises:
        CheckpointError: the settings are of another kind, a layer is incomplete or its tensors do not fit.
    """
    method, bits = settings.get("quant_method", "gptq"), settings.get("bits")
    form = settings.get("checkpoint_format") or "gptq"
    if method != "gptq" or bits not in BITS or form not in OFFSETS:
        raise CheckpointError(
            f"config.json: quantization_config has quant_method {shown(method)}, bits {shown(bits)} and "
            f"checkpoint_format {shown(form)}; hfvlm reads 'gptq' of {', '.join(map(str, BITS))} bits, in "
            f"{' or '.join(OFFSETS)}."
        )
    layers = [key.removesuffix(f".{PACKED}") for key in tensors if key.endswith(f".{PACKED}")]
    if not layers:
        raise CheckpointError("config.json has a quantization_config, but the file has no quantized layer.")
    missing = [f"{layer}.{part}" for layer in layers for part in REST if f"{layer}.{part}" not in tensors]
    if missing:
        raise CheckpointError(f"{len(missing)} tensors of quantized layers are missing, the first is {missing[0]}.")
    packed = {f"{layer}.{part}" for layer in layers for part in (PACKED, *REST)}
    packed |= {f"{layer}.bias" for layer in layers if not layer.endswith(tuple(biased))}
    plain = LazyTensors.of(tensors, [key for key in tensors if key not in packed])
    return plain | LazyTensors(
        {f"{layer}.weight": partial(_weight, tensors, layer, bits, OFFSETS[form], packed) for layer in layers}
    )


def _weight(tensors: Mapping[str, Tensor], layer: str, bits: int, offset: int, packed: Collection[str]) -> Tensor:
    bias = tensors[f"{layer}.bias"] if f"{layer}.bias" in packed and f"{layer}.bias" in tensors else None
    if bias is not None and not bias.is_meta and bool(bias.any()):
        raise CheckpointError(f"{layer}.bias is not zero, but the model has no such bias.")
    codes = _unpacked(tensors[f"{layer}.{PACKED}"].t(), bits)
    zeros, scales, groups = (tensors[f"{layer}.{part}"] for part in REST)
    zeros = _unpacked(zeros, bits) + offset
    if zeros.shape != scales.shape or codes.shape != (scales.shape[-1], len(groups)):
        raise CheckpointError(
            f"{layer}: {tuple(codes.shape)} codes of {bits} bits do not fit scales {tuple(scales.shape)}, zeros "
            f"{tuple(zeros.shape)} and g_idx {tuple(groups.shape)}."
        )
    if not groups.is_meta and not 0 <= int(groups.min()) <= int(groups.max()) < len(scales):
        raise CheckpointError(f"{layer}.g_idx names groups from {groups.min()} to {groups.max()} of {len(scales)}.")
    groups = groups.long()
    return (codes - zeros[groups].t()).to(scales.dtype).mul_(scales[groups].t()).contiguous()


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 `(rows, n)` into codes `(rows, n * 32 / bits)`, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> shifts).bitwise_and_(2**bits - 1).flatten(1)
