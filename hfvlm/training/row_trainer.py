"""transformers' Trainer on rows of media."""

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from hfvlm.losses.blocks import check_negatives
from hfvlm.media.rows import undecoded
from hfvlm.training.continuing import check_checkpoint, whole_checkpoint
from hfvlm.training.data import BOOKKEEPING, EpochSampler, Rows, StreamedRows
from hfvlm.training.failures import check_arguments, check_loss, check_processes, check_weights
from hfvlm.training.parameters import decay_by_layer, split_groups, tower_modules


class GuardedTrainer(Trainer):
    """`Trainer` that refuses arguments out of range, ends runs that cannot succeed, and resumes only from whole
    checkpoints. Arguments as `transformers.Trainer`.

    Raises:
        ValueError: an argument is out of its range, or the processes that were started do not train together.
    """

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **options: Any):
        if args is not None:
            check_arguments(args)
            check_processes(args)
        super().__init__(model, args, *rest, **options)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; with True, resume from the newest checkpoint that is whole.

        Raises:
            ValueError: there is no whole checkpoint, or the one that is named is not whole.
            TrainingError: the loss or the weights are not finite.
        """
        if isinstance(resume_from_checkpoint, str) and resume_from_checkpoint.lower() in ("true", "false"):
            resume_from_checkpoint = resume_from_checkpoint.lower() == "true"
        if resume_from_checkpoint is True:
            resume_from_checkpoint = whole_checkpoint(self.args.output_dir or ".", self.args.world_size)
        elif resume_from_checkpoint:
            resume_from_checkpoint = check_checkpoint(resume_from_checkpoint, self.args.world_size)
        done = super().train(resume_from_checkpoint or None, *args, **kwargs)
        check_weights(self.model, self.state.global_step)
        return done

    # Learning rate of what is trained next to adapters, relative to theirs.
    whole_rate: float = 1.0
    # Of towers by their short names, the factor of the learning rate from each layer to the one before it.
    layer_decay: Mapping[str, float] = MappingProxyType({})

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        model: Any = self.model
        if made and self.whole_rate != 1:
            adapters = {parameter for name, parameter in model.named_parameters() if ".lora_" in name}
            split_groups(optimizer, lambda p, rate: rate if p in adapters else rate * self.whole_rate)
        if made and self.layer_decay:
            bare = getattr(model, "get_base_model", lambda: model)()
            decay_by_layer(optimizer, tower_modules(bare, list(self.layer_decay)), self.layer_decay)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Select as transformers, without what the model lists in `undecayed_parameters`."""
        bare: Any = getattr(model, "get_base_model", lambda: model)()
        kept = tuple(f"{name}." for name in getattr(bare, "undecayed_parameters", ()))
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.removeprefix("base_model.model.").startswith(kept)]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        check_loss(loss, self.state.global_step + 1, self.args)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001, FBT002
        """Save as `Trainer`, unless weights are not finite; of sharded parameters the whole model, which transformers
        leaves out where checkpoints are sharded.

        Raises:
            TrainingError: they are not.
        """
        check_weights(self.model, self.state.global_step)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled and not _internal_call else None
        if plugin is None:
            super().save_model(output_dir, _internal_call)
            return
        of_checkpoints = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.set_state_dict_type(of_checkpoints)


class RowTrainer(GuardedTrainer):
    """Trainer of a model by its own loss, on rows that are read, augmented and put into batches in the loader's
    workers.

    Rows that cannot be read are replaced, and counted as `replaced_rows` in the log. A run that resumes from a
    checkpoint continues exactly as if it had not been interrupted. Data sets that stream are read in their own order;
    their rows that cannot be read are left out.

    Arguments as `transformers.Trainer`; the collator is a ContrastiveCollator, or any function from a list of rows to
    the model's inputs.
    """

    # Inputs of forward for training, added to a batch's.
    training_inputs: Mapping[str, Any] = {"return_loss": True}

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.args.label_names is None and self.training_inputs:
            # The loss comes with `return_loss`, whatever labels forward takes; transformers would wait for all labels.
            self.label_names = []
        self.sampler: EpochSampler | None = None
        self.rows_seen, self.rows_replaced, self.logged_at = 0, 0, time.perf_counter()
        self.add_callback(_EachEpoch(self))

    @property
    def data_seed(self) -> int:
        """The seed of the rows' order and augmentation."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(dataset)
        self.sampler = EpochSampler(len(dataset), self.data_seed)
        return self.sampler

    def _get_dataloader(  # type: ignore[override]
        self, dataset: Any, description: str, batch_size: int, *, is_training: bool = False, **options: Any
    ) -> DataLoader[Any]:
        read = getattr(self.data_collator, "read", None)
        if not isinstance(dataset, IterableDataset):
            whole = batch_size * self.args.world_size
            if is_training and self.args.dataloader_drop_last and len(dataset) < whole:
                raise ValueError(
                    f"{len(dataset)} rows make no batch of {whole}: lower per_device_train_batch_size, or set "
                    "dataloader_drop_last=False."
                )
            self.check_last_batch(len(dataset), whole, is_training=is_training)
            dataset = Rows(undecoded(dataset), read, self.data_seed)
        else:
            group = batch_size if is_training and self.args.dataloader_drop_last else None
            dataset = StreamedRows(undecoded(dataset), read, self.data_seed, group=group, training=is_training)
        # transformers would leave the last rows of an evaluation out, too.
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(dataset, description, batch_size, is_training=is_training, **options)
        finally:
            self.args.dataloader_drop_last = drop_last

    def check_last_batch(self, rows: int, whole: int, *, is_training: bool) -> None:
        """Refuse an epoch whose last batch is one pair, for a model that compares it with others.

        Raises:
            ValueError: it is.
        """
        compares = callable(getattr(self.accelerator.unwrap_model(self.model), "contrast", None))
        if is_training and compares and rows % whole == 1 and not self.args.dataloader_drop_last:
            remedy = f"The last batch has one of {rows} rows: set dataloader_drop_last=True, or another batch size."
            check_negatives(1, 1, remedy)

    def count(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Count a batch's rows; return its inputs without the collator's bookkeeping."""
        self.rows_seen += len(next(v for v in inputs.values() if isinstance(v, Tensor))) * self.args.world_size
        self.rows_replaced += int(inputs["replaced"].sum()) if "replaced" in inputs else 0
        return without_bookkeeping(inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        return super().training_step(model, self.count(inputs) | dict(self.training_inputs), num_items_in_batch)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(
            model, without_bookkeeping(inputs) | dict(self.training_inputs), *args, **kwargs
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the training loss, rows per second and the number of rows that were replaced so far."""
        if "loss" in logs:
            now = time.perf_counter()
            logs["samples_per_second"] = round(self.rows_seen / (now - self.logged_at), 3)
            self.rows_seen, self.logged_at = 0, now
            if self.rows_replaced:
                logs["replaced_rows"] = self.rows_replaced
        super().log(logs, *args, **kwargs)


class LabelTrainer(RowTrainer):
    """Trainer of a model by the loss of its `labels`."""

    training_inputs = {}

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.args.label_names is None:
            self.label_names = ["labels"]


class _EachEpoch(TrainerCallback):
    """Callback that gives each epoch its own order."""

    def __init__(self, trainer: RowTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.sampler is not None:
            self.trainer.sampler.epoch = int(state.epoch or 0)


def without_bookkeeping(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the collator's entries about rows from a batch's inputs."""
    return {name: value for name, value in inputs.items() if name not in BOOKKEEPING}
