"""The arguments of trainings that take minutes: of the examples, and of first tries."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from hfvlm.checks.ranges import check_integer

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def short_run(output: str | Path, steps: int, kind: type[Arguments] = TrainingArguments, **changes: Any) -> Arguments:  # type: ignore[assignment]
    """Make the arguments of a run that keeps no checkpoints, and shows nothing but its losses.

    The learning rate, 0.002, rises over a twentieth of the steps and falls as a cosine; batches have 32 rows, with all
    of their columns.

    Args:
        output: the folder of a Trainer's files, of which a short run writes none.
        steps: of the optimizer.
        kind: `transformers.TrainingArguments`, or those of a Trainer of hfvlm.
        **changes: of its fields, in place of these values.

    Raises:
        TypeError: `changes` has a field that the arguments lack.
        ValueError: `steps` is below 1.
    """
    usual: dict[str, Any] = {
        "max_steps": check_integer("steps", steps, 1),
        "per_device_train_batch_size": 32,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.01,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return kind(str(output), **usual | changes)
