"""Contrastive training on transformers' Trainer."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState
from transformers.utils import ModelOutput

from hfvlm.evaluation.retrieval import recall_at
from hfvlm.losses import PAIR_LOSSES
from hfvlm.losses.blocks import check_negatives
from hfvlm.modeling.outputs import contrastive_fields
from hfvlm.training.arguments import ContrastiveTrainingArguments
from hfvlm.training.data import ContrastiveCollator
from hfvlm.training.failures import CollapseWatch, check_loss
from hfvlm.training.gradient_cache import cached_backward
from hfvlm.training.parameters import set_patch_dropout, split_by_tower, tower_modules
from hfvlm.training.row_trainer import RowTrainer, without_bookkeeping


class ContrastiveTrainer(RowTrainer):
    """Trainer of a model whose rows are compared with one another; of any architecture of hfvlm that has `contrast`
    and, if its embeddings are compared in another way than by their product, `score`.

    It is a RowTrainer, and so transformers' Trainer, with

    - the loss over the whole batch: over all processes, and in mini-batches where the batch does not fit into memory;
    - evaluations of the whole evaluation set: its loss, which depends on its size, and recall@k between modalities.
      Rows that cannot be read are left out there.

    Args:
        model: the model, or a PEFT model around it.
        args: ContrastiveTrainingArguments.
        data_collator: a ContrastiveCollator, or any function from a list of rows to the model's inputs. By default a
            ContrastiveCollator around `processing_class`.
        processing_class: the model's processor, saved with it.
        compute_metrics: takes an EvalPrediction whose `predictions` are the embeddings by name, and returns further
            metrics.
        **options: of `transformers.Trainer`.
    """

    args: ContrastiveTrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: ContrastiveTrainingArguments | None = None,
        data_collator: Any = None,
        *,
        processing_class: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **options: Any,
    ):
        args = args or ContrastiveTrainingArguments("contrastive")
        if not isinstance(args, ContrastiveTrainingArguments):
            raise TypeError(f"ContrastiveTrainer needs ContrastiveTrainingArguments, not {type(args).__name__}.")
        if args.n_gpu > 1:
            raise ValueError("Start one process for each GPU: `torchrun --nproc_per_node N script.py`.")
        if data_collator is None and processing_class is None:
            raise ValueError("Without a data_collator, ContrastiveTrainer needs the processor: processing_class=.")
        self.further_metrics = compute_metrics
        super().__init__(
            model,
            args,
            data_collator or ContrastiveCollator(processing_class),
            processing_class=processing_class,
            compute_metrics=self.whole_set_metrics,
            **options,
        )
        if args.mini_batch_size and self.is_deepspeed_enabled:
            raise ValueError("mini_batch_size does not go with DeepSpeed; use FSDP2, or leave it out.")
        if not callable(getattr(self.model, "contrast", None)):
            raise TypeError(f"{type(self.model).__name__} has no `contrast`: it is no model that compares rows.")
        self.watch = CollapseWatch()
        self.bare_model: Any = getattr(self.model, "get_base_model", lambda: self.model)()
        self.frozen = self.freeze()
        self.training_inputs = getattr(self.bare_model, "training_inputs", {})
        self.group = dist.group.WORLD if args.world_size > 1 and args.gather_negatives else None
        self.add_callback(_BoundTemperature(self))

    def freeze(self) -> dict[str, nn.Module]:
        """Apply the arguments to the model; return the towers that are not trained."""
        if self.args.patch_dropout is not None:
            set_patch_dropout(self.bare_model, self.args.patch_dropout)
        frozen = tower_modules(self.bare_model, self.args.frozen_towers)
        for tower in frozen.values():
            tower.requires_grad_(requires_grad=False)
        return frozen

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `RowTrainer`.

        Raises:
            ValueError: a batch is one pair, without negatives.
        """
        processes = self.args.world_size if self.args.gather_negatives else 1
        remedy = "Set per_device_train_batch_size to at least 2; mini_batch_size saves memory."
        check_negatives(self.args.train_batch_size, processes, remedy)
        return super().train(*args, **kwargs)

    # Loss

    def contrast(self, output: ModelOutput) -> Tensor:
        """Return the loss of a whole batch, in the precision of the embeddings or better."""
        loss = PAIR_LOSSES.get(self.args.loss or "")
        if self.model is not None and self.model.training:
            self.watch.see(output, self.state.global_step + 1, self.args)
        with torch.autocast(self.args.device.type, enabled=False):
            return self.bare_model.contrast(output, loss, self.group)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 (transformers' signature)
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        self.leave_frozen()
        output = model(**inputs)
        loss = self.contrast(output)
        return (loss, output) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if not self.args.mini_batch_size:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        self.leave_frozen()
        loss = cached_backward(
            model,
            self.contrast,
            self._prepare_inputs(self.count(inputs)) | dict(self.training_inputs),
            self.args.mini_batch_size,
            precision=self.compute_loss_context_manager,
            backward=self.accelerator.backward,
            unsynchronised=partial(self.accelerator.no_sync, model),
        )
        check_loss(loss, self.state.global_step + 1, self.args)
        return loss

    def leave_frozen(self) -> None:
        """Put towers that are not trained in inference mode: without dropout, and with constant batch norms."""
        for tower in self.frozen.values():
            tower.eval()

    # Parameters

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Select the matrices; biases, norms and temperatures do not decay."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = self.args.tower_learning_rates
        if made and isinstance(rates, Mapping):
            towers = tower_modules(self.bare_model, list(rates))
            split_by_tower(optimizer, towers, {name: float(rate) for name, rate in rates.items()})
        return optimizer

    # Evaluation

    def prediction_step(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool = False,  # noqa: FBT001, FBT002 (transformers' signature)
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, dict[str, Tensor], Tensor]:
        """Embed a batch.

        Returns:
            No loss; the embeddings of the rows, `(B, ...)`, and of their captions, `(B, captions, ...)`; `(B, 2)`, the
            rows' identifiers and whether they replace others.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**without_bookkeeping(inputs))
        self.output_type = type(output)
        rows, self.factors = contrastive_fields(output)
        rows = {name: value.float() if value.is_floating_point() else value for name, value in rows.items()}
        self.unnamed = "row_ids" not in inputs
        if self.unnamed:
            return (
                None,
                rows,
                torch.zeros(len(next(iter(rows.values()))), 2, dtype=torch.long, device=self.args.device),
            )
        counts = inputs["caption_counts"]
        captions = {k: list(v.split(counts.tolist())) for k, v in rows.items() if k.startswith("text_")}
        rows |= {k: nn.utils.rnn.pad_sequence(v, batch_first=True) for k, v in captions.items()}
        rows["caption_counts"] = counts
        return None, rows, torch.stack([inputs["row_ids"], inputs["replaced"]], dim=1)

    def whole_set_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the loss of all rows, each with its first caption, and recall between every two modalities."""
        ids, replaced = torch.as_tensor(prediction.label_ids).unbind(dim=1)
        predictions: Any = prediction.predictions
        rows = {name: torch.as_tensor(value)[replaced == 0] for name, value in predictions.items()}
        ids = torch.arange(len(ids)) if self.unnamed else ids[replaced == 0]
        counts = rows.pop("caption_counts", None)
        first = rows if counts is None else {k: v[:, 0] if k.startswith("text_") else v for k, v in rows.items()}
        output = self.output_type(**first, **{name: value.float().cpu() for name, value in self.factors.items()})
        metrics = {"loss": self.bare_model.contrast(output, PAIR_LOSSES.get(self.args.loss or "")).item()}
        sets = {}
        for name, value in rows.items():
            modality = name.removesuffix("_embeds")
            if modality != name and hasattr(self.bare_model, f"get_{modality}_features"):
                if modality == "text" and counts is not None:
                    present = torch.arange(value.shape[1]) < counts[:, None]
                    sets[modality] = value[present], ids[:, None].expand_as(present)[present]
                else:
                    sets[modality] = first_of_each(value, ids)
        for (a, (queries, query_ids)), (b, (gallery, gallery_ids)) in permutations(sets.items(), 2):
            score = getattr(self.bare_model, "score", None)  # of embeddings that are compared in their own way
            recalls = recall_at(queries, gallery, self.args.recall_at, query_ids, gallery_ids, score=score)
            metrics |= {f"{a}_to_{b}_recall@{k}": share for k, share in recalls.items()}
        if replaced.any():
            metrics["unreadable_rows"] = int((replaced > 0).sum())
        if self.further_metrics is not None:
            metrics |= self.further_metrics(prediction)
        return metrics


class _BoundTemperature(TrainerCallback):
    """Callback that bounds the temperature after each step."""

    def __init__(self, trainer: ContrastiveTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.bare_model.bound_temperatures(self.trainer.args.max_logit_scale)


def first_of_each(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Select the first row of each identifier: an image with several captions occurs once."""
    _, inverse = ids.unique(return_inverse=True)
    order = torch.arange(len(ids)).flip(0)
    first = torch.empty(int(inverse.max()) + 1, dtype=torch.long).scatter_(0, inverse.flip(0), order).sort().values
    return values[first], ids[first]
