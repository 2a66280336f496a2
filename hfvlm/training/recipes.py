"""Whole training runs, as a YAML file or a command line describes them."""

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BitsAndBytesConfig,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hfvlm.inference.adapters import adapter_settings, hub_name, model_class, processor_of
from hfvlm.inference.adapters import load_model as load_whole
from hfvlm.logs import shows_progress
from hfvlm.media.rows import load_rows
from hfvlm.presets.cards import write_card
from hfvlm.training.arguments import ContrastiveTrainingArguments
from hfvlm.training.augmentation import RandomResizedCrop
from hfvlm.training.chat import ChatCollator, ChatTrainer, read_examples
from hfvlm.training.columns import training_columns
from hfvlm.training.curves import draw_curve
from hfvlm.training.data import CaptionCollator, ContrastiveCollator
from hfvlm.training.failures import check_arguments, check_processes
from hfvlm.training.lora import lora
from hfvlm.training.masking import MaskingCollator
from hfvlm.training.outputs import run_output
from hfvlm.training.painting import PaintingCollator
from hfvlm.training.recipe_arguments import ChatDataArguments, DataArguments, ModelArguments
from hfvlm.training.recipe_files import checked, read_recipe
from hfvlm.training.row_trainer import RowTrainer
from hfvlm.training.trainer import ContrastiveTrainer

logger = logging.getLogger(__name__)


def run_recipe(
    path: str | Path, changes: Sequence[str] = (), *, overwrite: bool = False, resume: bool = False
) -> dict[str, float]:
    """Train as a YAML file defines it; return the run's metrics.

    Args:
        path: of a file with a `task`, one of TASKS, and fields of its arguments. The fields under `on_cpu` hold where
            there is no accelerator; `auto` leaves `bf16` and `dataloader_num_workers` to the machine.
        changes: "field=value", or "field.key=value" of a mapping, which take precedence over the file.
        overwrite: replace what an earlier run wrote into output_dir.
        resume: resume from output_dir's newest checkpoint.

    Raises:
        ValueError: the file is no recipe, or has unknown fields or values that cannot be.
        FileExistsError: output_dir has an earlier run, and neither `overwrite` nor `resume` is on.
    """
    recipe = read_recipe(path, changes)
    task = recipe.pop("task", None)
    if task not in TASKS:
        raise ValueError(f"{path}: task {task!r} is none of {', '.join(TASKS)}.")
    kinds, train = TASKS[task]
    try:
        parsed = HfArgumentParser(kinds).parse_dict(checked(recipe, kinds))
        check_arguments(parsed[-1])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    arguments = parsed[-1]
    check_processes(arguments)
    if resume:
        arguments.resume_from_checkpoint = True
    going_on = bool(arguments.resume_from_checkpoint)
    with run_output(Path(arguments.output_dir or "trainer_output"), overwrite=overwrite, resume=going_on):
        return train(*parsed)


def load_model(arguments: ModelArguments, seed: int) -> Any:
    """Load a model of the class that its files name; only what is trained requires gradients.

    Raises:
        ValueError: hfvlm has no such class, the model no such part, or an adapter is to be trained on an adapter.
    """
    set_seed(seed)  # adapters begin at random
    if arguments.lora_recipe is not None and adapter_settings(arguments.model) is not None:
        raise ValueError(
            f"{arguments.model}: is an adapter; another one begins from a whole model: "
            f"hfvlm merge {arguments.model} -o OUTPUT."
        )
    kind = model_class(arguments.model)
    options: dict[str, Any] = {"modalities": arguments.modalities} if arguments.modalities else {}
    if arguments.four_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = load_whole(arguments.model, kind, **options)
    if arguments.trained_parts is not None:
        for parameter in model.parameters():
            parameter.requires_grad_(requires_grad=False)
        for name in arguments.trained_parts:
            if not hasattr(model, name):
                parts = ", ".join(name for name, _ in model.named_children())
                raise ValueError(f"trained_parts: {kind.__name__} has no {name}; it has {parts}.")
            getattr(model, name).requires_grad_(requires_grad=True)
    if arguments.lora_recipe is not None:
        quiet = not shows_progress()
        model = lora(model, arguments.lora_recipe, r=arguments.lora_rank, dropout=arguments.lora_dropout, quiet=quiet)
    return model


def data_options(
    data: DataArguments,
    processor: Any,
    arguments: TrainingArguments,
    collator: type[ContrastiveCollator] = ContrastiveCollator,
    *,
    needed: Sequence[str] = ("image", "text"),
    modalities: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return a trainer's arguments for its rows.

    Args:
        data: the rows and their columns.
        processor: of the model.
        arguments: of the run; a batch that is larger than the data becomes all of them.
        collator: makes batches.
        needed: the modalities without which there is nothing to train on.
        modalities: those of the model; by default the processor's.
        **options: of the collator.
    """
    augment = {}
    if data.crop_scale is not None:
        augment["image"] = RandomResizedCrop(processor.image_processor.size["height"], (data.crop_scale, 1.0))
    rows = split_of(data, data.train_split, "train_split")
    given = (data.columns or {}) | ({"text": data.text_column} if data.text_column else {})
    known: Any = modalities or getattr(processor, "modalities", ("image", "text"))
    columns = training_columns(rows, given, needed=needed, modalities=known, source=data.dataset)
    fit_batch(arguments, rows)
    return {
        "data_collator": collator(processor, columns, id_column=data.id_column, augment=augment, **options),
        "train_dataset": rows,
        "eval_dataset": split_of(data, data.eval_split, "eval_split") if data.eval_split else None,
        "processing_class": processor,
    }


def split_of(data: DataArguments, split: str, field_name: str) -> Any:
    """Load the rows of a split.

    Raises:
        ValueError: there are none of that name; naming the recipe's field.
    """
    try:
        return load_rows(data.dataset, data.subset, split=split)
    except ValueError as error:
        raise ValueError(f"{data.dataset}: {field_name} {split!r} cannot be read: {error}") from error


def fit_batch(arguments: TrainingArguments, rows: Any) -> None:
    """Reduce the batch to the number of rows; an incomplete batch would be left out."""
    if not hasattr(rows, "__len__"):
        return
    share = len(rows) // max(1, arguments.world_size)
    if 0 < share < arguments.per_device_train_batch_size:
        wanted = arguments.per_device_train_batch_size
        logger.warning("per_device_train_batch_size %d is more than the number of rows: it becomes %d.", wanted, share)
        arguments.per_device_train_batch_size = share


def train_contrastive(
    model_arguments: ModelArguments, data: DataArguments, arguments: ContrastiveTrainingArguments
) -> dict[str, float]:
    """Compare the rows of large batches with one another, with a ContrastiveTrainer."""
    processor = processor_of(model_arguments.model)
    modalities = model_arguments.modalities
    options = data_options(data, processor, arguments, needed=modalities or ("image", "text"), modalities=modalities)
    trainer = ContrastiveTrainer(load_model(model_arguments, arguments.seed), arguments, **options)
    return finish(trainer, arguments)


def train_pairs(
    model_arguments: ModelArguments, data: DataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train on images with captions by all of the model's own losses at once, batch by batch."""
    processor = processor_of(model_arguments.model)
    arguments.remove_unused_columns = False
    hides = hasattr(processor.image_processor, "patch_mask")  # patches, and with them words
    collator = MaskingCollator if hides else ContrastiveCollator
    needed = () if data.columns else ("image", "text")  # some models train on either by itself
    options = data_options(data, processor, arguments, collator, needed=needed, all_captions=False)
    if hides:
        options["data_collator"].negatives = options["train_dataset"]
    trainer = RowTrainer(load_model(model_arguments, arguments.seed), arguments, **options)
    return finish(trainer, arguments)


class CaptionTrainer(RowTrainer):
    """Trainer of a model by the loss of its `labels`."""

    training_inputs = {}

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.args.label_names is None:
            self.label_names = ["labels"]


def train_captions(
    model_arguments: ModelArguments, data: DataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train a model that generates the captions of images."""
    processor = processor_of(model_arguments.model)
    arguments.remove_unused_columns = False
    options = data_options(data, processor, arguments, CaptionCollator, all_captions=False)
    trainer = CaptionTrainer(load_model(model_arguments, arguments.seed), arguments, **options)
    return finish(trainer, arguments)


def train_chat(
    model_arguments: ModelArguments, data: ChatDataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train on the answers of conversations about images."""
    processor = processor_of(model_arguments.model)
    arguments.remove_unused_columns = False
    trainer = ChatTrainer(
        load_model(model_arguments, arguments.seed),
        arguments,
        ChatCollator(processor, max_length=data.max_length),
        train_dataset=read_examples(data.data, data.pictures),
        processing_class=processor,
    )
    return finish(trainer, arguments)


def train_painting(
    model_arguments: ModelArguments, data: DataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train a model that is shown tasks by pairs, on rows with an image, its painted target and the name of a task."""
    processor, model = processor_of(model_arguments.model), load_model(model_arguments, arguments.seed)
    arguments.remove_unused_columns = False
    rows = split_of(data, data.train_split, "train_split")
    fit_batch(arguments, rows)
    scale = 0.3 if data.crop_scale is None else data.crop_scale
    trainer = RowTrainer(
        model,
        arguments,
        PaintingCollator(processor, model.config.patch_size, rows, data.columns, crop_scale=scale),
        train_dataset=rows,
        eval_dataset=split_of(data, data.eval_split, "eval_split") if data.eval_split else None,
    )
    metrics = finish(trainer, arguments)
    if trainer.is_world_process_zero():
        processor.save_pretrained(arguments.output_dir or ".")  # transformers looks for a tokenizer in a trainer's
    return metrics


def finish(trainer: Trainer, arguments: TrainingArguments) -> dict[str, float]:
    """Train, and save the model (adapters as such) with its processor and card and, where matplotlib is installed, an
    image of the run, `curve.png`; return the metrics of a last evaluation."""
    metrics = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint).metrics
    trainer.save_model()
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        folder = Path(arguments.output_dir or ".")
        model: Any = trainer.model
        base = str(model.config.name_or_path)
        write_card(folder, base_model=hub_name(base), text=f"Fine-tuned from `{Path(base).name}`." if base else "")
        if find_spec("matplotlib"):
            draw_curve(trainer.state.log_history, folder / "curve.png")
    return metrics


TASKS: dict[str, tuple[tuple[Any, ...], Callable[..., dict[str, float]]]] = {
    "contrastive": ((ModelArguments, DataArguments, ContrastiveTrainingArguments), train_contrastive),
    "pairs": ((ModelArguments, DataArguments, TrainingArguments), train_pairs),
    "captions": ((ModelArguments, DataArguments, TrainingArguments), train_captions),
    "painting": ((ModelArguments, DataArguments, TrainingArguments), train_painting),
    "chat": ((ModelArguments, ChatDataArguments, TrainingArguments), train_chat),
}
