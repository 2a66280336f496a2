"""Runs that cannot succeed: they are refused or ended, with what to change."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.utils import ModelOutput

from hfvlm.checks.ranges import Ranges, check_ranges
from hfvlm.modeling.outputs import contrastive_fields

# Collapsed steps in a row before a run is ended.
PATIENCE = 3
# Variance of embeddings of unit length below which all are equal, and the share of its first value that is collapse.
SAME, SHARE = 1e-10, 1e-3
# A temperature's factor below which all logits are equal.
LEAST_SCALE = 1e-4
MOST_SEED = 2**32 - 1

# Of the arguments of transformers and of recipes.
RANGES: Ranges = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "save_total_limit", "dataloader_prefetch_factor", "eval_accumulation_steps", "mini_batch_size",
            "lora_rank", "max_length", "image_size", "lora_alpha", "crop_from", "reward_batch_size",
            "max_completion_length", "num_iterations", "steps_per_generation",
        ),
        (True, 1, None, True),
    ),
    **dict.fromkeys(("seed", "data_seed"), (True, 0, MOST_SEED, True)),
    "dataloader_num_workers": (True, 0, None, True),
    "num_generations": (True, 2, None, True),
    "max_steps": (True, -1, None, True),
    **dict.fromkeys(
        (
            *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay", "beta"),
            "neftune_noise_alpha",
        ),
        (False, 0, None, True),
    ),
    **dict.fromkeys(
        ("whole_rate", "adam_epsilon", "num_train_epochs", "logging_steps", "save_steps", "eval_steps",
        "max_logit_scale", "temperature"), (False, 0, None, False),
    ),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "warmup_ratio", "label_smoothing_factor", "lora_dropout", "patch_dropout"),
        (False, 0, 1, True),
    ),
    "crop_scale": (False, 0, 1, False),
}  # fmt: skip


class TrainingError(ValueError):
    """A run that cannot go on; the message names the step, and what to change."""


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse numbers out of range among the arguments of a run; None leaves one to its default.

    Raises:
        ValueError: the message names the argument and its range.
    """
    check_ranges(values, RANGES)
    if values.get("max_steps") == 0:
        raise ValueError("max_steps must be -1 (by num_train_epochs) or at least 1, not 0.")
    if values.get("patch_dropout") == 1:
        raise ValueError("patch_dropout must be below 1, not 1: some patches must be left.")


def check_arguments(arguments: TrainingArguments) -> None:
    """Refuse numbers out of range among a trainer's arguments, as `check_values`.

    Raises:
        ValueError: the message names the argument and its range.
    """
    check_values({name: getattr(arguments, name, None) for name in RANGES})


def check_processes(arguments: TrainingArguments) -> None:
    """Refuse to train in one of several processes as if it were the only one.

    Raises:
        ValueError: the launcher started more processes than the arguments see.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > 1 and arguments.world_size != started:
        raise ValueError(
            f"{started} processes were started (WORLD_SIZE), but the arguments see {arguments.world_size}: each would "
            "train by itself and write to one folder. On CPUs set use_cpu: true (and ddp_backend: gloo); on GPUs "
            "start no more processes than there are GPUs."
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
    """Watch over the embeddings of each training batch, which ends a run in which they have become equal."""

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.suspicious = 0

    @torch.no_grad()
    def see(self, output: ModelOutput, step: int, arguments: TrainingArguments) -> None:
        """Observe one batch's embeddings.

        Raises:
            TrainingError: for some steps all rows of a modality have had the same embedding, or the temperature made
                all logits equal.
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
            same = f"all rows of a batch have the same {', '.join(names)}"
            what = same if names else "the temperature makes all logits equal"
            raise TrainingError(
                f"Step {step}: {what}; the run has collapsed. Lower learning_rate (now {arguments.learning_rate:g}) "
                "or add warmup_steps; if this holds from the start, look for copies in the data."
            )


def spread_of(embeds: Tensor) -> Tensor:
    """Return the variance of a batch's embeddings, over all of their numbers."""
    flat = embeds.detach().flatten(1).float()
    return (flat - flat.mean(dim=0)).square().sum(dim=1).mean()
