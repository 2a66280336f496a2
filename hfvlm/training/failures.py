"""Runs that can only fail: told apart and ended, with what to change."""

import os
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.utils import ModelOutput

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.modeling.outputs import contrastive_fields

# Steps in a row that look collapsed before a run is ended.
PATIENCE = 3
# Variance of embeddings of unit length below which all are the same, and the share of its first value that is nothing.
SAME, SHARE = 1e-10, 1e-3
# A temperature's factor below which nothing is compared.
LEAST_SCALE = 1e-4
MOST_SEED = 2**32 - 1

COUNTS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "save_total_limit": 1,
    "dataloader_prefetch_factor": 1,
    "eval_accumulation_steps": 1,
}
NUMBERS: dict[str, tuple[float, float | None, bool]] = {
    "learning_rate": (0, None, False),
    "weight_decay": (0, None, False),
    "adam_beta1": (0, 1, False),
    "adam_beta2": (0, 1, False),
    "adam_epsilon": (0, None, True),
    "max_grad_norm": (0, None, False),
    "num_train_epochs": (0, None, True),
    "warmup_steps": (0, None, False),
    "warmup_ratio": (0, 1, False),
    "logging_steps": (0, None, True),
    "save_steps": (0, None, True),
    "eval_steps": (0, None, True),
    "eval_delay": (0, None, False),
    "label_smoothing_factor": (0, 1, False),
    "neftune_noise_alpha": (0, None, False),
}


class TrainingError(ValueError):
    """A run that cannot go on; the message says at which step, and what to change."""


def check_arguments(arguments: TrainingArguments) -> None:
    """Refuse numbers out of range among transformers' own arguments; None leaves one to transformers.

    Raises:
        ValueError: the message names the argument and its range.
    """
    for name, lowest in COUNTS.items():
        if (value := getattr(arguments, name, None)) is not None:
            check_integer(name, value, lowest)
    for name, (low, high, open_low) in NUMBERS.items():
        if (value := getattr(arguments, name, None)) is not None:
            check_number(name, value, low, high, open_low=open_low)
    if check_integer("max_steps", arguments.max_steps, -1) == 0:
        raise ValueError("max_steps must be -1 (by num_train_epochs) or at least 1, not 0.")
    for name in ("seed", "data_seed"):
        if (value := getattr(arguments, name)) is not None:
            check_integer(name, value, 0, MOST_SEED)


def check_processes(arguments: TrainingArguments) -> None:
    """Refuse to train in one of several processes as if it were alone.

    Raises:
        ValueError: the launcher started more processes than the arguments see.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > 1 and arguments.world_size != started:
        raise ValueError(
            f"{started} processes were started (WORLD_SIZE), but the arguments see {arguments.world_size}: each would "
            "train alone and write to one folder. On CPUs set use_cpu: true (and ddp_backend: gloo); on GPUs start "
            "no more processes than there are GPUs."
        )


def check_loss(loss: Tensor, step: int, arguments: TrainingArguments) -> None:
    """End a run whose loss is not finite.

    Raises:
        TrainingError: it is not.
    """
    if not bool(torch.isfinite(loss).all()):
        raise TrainingError(
            f"Step {step}: the loss is {float(loss.float().mean())}. Lower learning_rate (now "
            f"{arguments.learning_rate:g}), or look for NaN in the weights and the data."
        )


def check_weights(model: Any, step: int) -> None:
    """End a run whose weights are not finite, before they are saved.

    Raises:
        TrainingError: they are not.
    """
    for name, weight in model.named_parameters():
        own: Tensor = getattr(weight, "to_local", lambda weight=weight: weight)()
        if weight.requires_grad and own.is_floating_point() and not bool(own.detach().isfinite().all()):
            raise TrainingError(f"Step {step}: {name} is not finite; nothing is saved of it. Lower learning_rate.")


class CollapseWatch:
    """Looks at the embeddings of each training batch, and ends a run in which they have become all the same."""

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.suspicious = 0

    @torch.no_grad()
    def see(self, output: ModelOutput, step: int, arguments: TrainingArguments) -> None:
        """Take notice of one batch's embeddings.

        Raises:
            TrainingError: for some steps now all rows of a modality have had the same embedding, or no difference
                counts any more.
        """
        rows, factors = contrastive_fields(output)
        embeds = {name: value for name, value in rows.items() if name.endswith("_embeds")}
        if any(len(value) < 2 for value in embeds.values()) or not embeds:
            return
        spread = torch.stack([spread_of(value) for value in embeds.values()]).cpu()
        scales = [value.detach().float().min().cpu() for name, value in factors.items() if name.endswith("_scale")]
        least = min(scales, default=torch.tensor(1.0))
        self.first = spread if self.first is None else self.first
        lost = (spread < SAME) | (spread < SHARE * self.first)
        collapsed = bool(lost.any()) or float(least) < LEAST_SCALE
        self.suspicious = self.suspicious + 1 if collapsed else 0
        if self.suspicious >= PATIENCE:
            names = [name for name, gone in zip(embeds, lost.tolist(), strict=True) if gone]
            what = (
                f"all rows of a batch have the same {', '.join(names)}"
                if names
                else "the temperature compares nothing"
            )
            raise TrainingError(
                f"Step {step}: {what}; the run has collapsed. Lower learning_rate (now {arguments.learning_rate:g}) "
                "or add warmup_steps; if it was so from the start, look for copies in the data."
            )


def spread_of(embeds: Tensor) -> Tensor:
    """The variance of a batch's embeddings, over all of their numbers."""
    flat = embeds.detach().flatten(1).float()
    return (flat - flat.mean(dim=0)).square().sum(dim=1).mean()
