"""The arguments of contrastive training."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.training.failures import check_arguments

LOSSES = ("softmax", "sigmoid", "focal")


@dataclass
class ContrastiveTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with those of contrastive training.

    `per_device_train_batch_size` is the number of rows that are compared with one another on each device.

    Args:
        mini_batch_size: rows whose activations are in memory at a time; None for all. The gradients are those of the
            whole batch, for the time of one more forward pass.
        gather_negatives: compare the rows of all processes with one another.
        loss: "softmax" (CLIP), "sigmoid" (SigLIP) or "focal" (MaMMUT); None for the architecture's own.
        max_logit_scale: bound of the temperature's factor; None for the architecture's own.
        tower_learning_rates: {"vision": 1e-6, "text": 1e-5, ...}; towers that are not named have `learning_rate`, and
            so has everything outside of the towers.
        frozen_towers: ["vision"] is locked-image tuning (LiT, https://arxiv.org/abs/2111.07991); these towers are left
            as they are and run as in inference.
        patch_dropout: share of an image's patches that is left out in training (FLIP,
            https://arxiv.org/abs/2212.00794); None for the rate in the model's configuration.
        recall_at: in evaluations, the k of recall@k, the share of rows with a positive among the k nearest.
    """

    mini_batch_size: int | None = field(default=None, metadata={"help": "Rows with activations in memory at a time."})
    gather_negatives: bool = field(default=True, metadata={"help": "Compare the rows of all processes."})
    loss: str | None = field(default=None, metadata={"help": f"One of {', '.join(LOSSES)}."})
    max_logit_scale: float | None = field(default=None, metadata={"help": "Bound of the temperature's factor."})
    tower_learning_rates: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Learning rates of towers, as {"vision": 1e-6}.'}
    )
    frozen_towers: list[str] = field(default_factory=list, metadata={"help": "Towers that are not trained."})
    patch_dropout: float | None = field(default=None, metadata={"help": "Share of patches that is left out."})
    recall_at: list[int] = field(default_factory=lambda: [1, 5, 10], metadata={"help": "The k of recall@k."})
    # Raw columns go to the collator, and batches of unequal sizes cannot be compared between processes.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave False: the collator reads them."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Leave out an incomplete last batch."})

    def __post_init__(self) -> None:
        check_arguments(self)
        super().__post_init__()
        if isinstance(self.tower_learning_rates, str):  # of a command line
            self.tower_learning_rates = rates_from(self.tower_learning_rates, "tower_learning_rates")
        self.check_own()
        if self.loss not in (None, *LOSSES):
            raise ValueError(f"loss {self.loss!r} is none of {', '.join(LOSSES)}.")
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                "gradient_accumulation_steps would compare each part of a batch only with itself, which is another "
                "loss. For large batches set per_device_train_batch_size to the whole batch, and mini_batch_size to "
                "what fits into memory."
            )

    def check_own(self) -> None:
        """Refuse numbers out of range in arguments of this class that hold several.

        Raises:
            ValueError: the message names the argument and its range.
        """
        for k in self.recall_at:
            check_integer("recall_at", k)
        if isinstance(self.tower_learning_rates, Mapping):
            for tower, rate in self.tower_learning_rates.items():
                check_number(f"tower_learning_rates of {tower}", rate, 0)


def rates_from(text: str, name: str) -> dict[str, Any]:
    """Parse the rates of towers on a command line, in JSON; `name` is the argument's.

    Raises:
        ValueError: they are no JSON object.
    """
    try:
        rates = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} {text!r:.200} is no JSON object ({error}).") from error
    if not isinstance(rates, dict):
        raise ValueError(f'{name} must be a JSON object such as {{"vision": 1e-6}}, not {text!r:.200}.')
    return rates
