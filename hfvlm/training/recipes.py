"""Whole training runs that are described in a YAML file, or on a command line."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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

from hfvlm.checks.ranges import check_integer, check_number
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
from hfvlm.training.recipe_files import checked, read_recipe
from hfvlm.training.row_trainer import RowTrainer
from hfvlm.training.trainer import ContrastiveTrainer

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Which model, and how much of it is trained.

    Args:
        model: a folder or a Hub id.
        modalities: [image, audio]: only these towers are loaded, of a model that has more than two.
        trained_parts: [projector, language_model]: all else is frozen; None trains all weights.
        lora_recipe: as "vision+text+scale", for `hfvlm.lora`: adapters are trained in place of the weights.
        lora_rank: of the adapters.
        lora_dropout: on the adapters' inputs.
        four_bits: load the frozen weights in 4 bits (QLoRA, https://arxiv.org/abs/2305.14314).
    """

    model: str = field(metadata={"help": "A folder or a Hub id."})
    modalities: list[str] | None = field(default=None, metadata={"help": "The towers to load, of more than two."})
    trained_parts: list[str] | None = field(default=None, metadata={"help": "As projector; all else is frozen."})
    lora_recipe: str | None = field(default=None, metadata={"help": "As vision+text+scale: adapters are trained."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' inputs."})
    four_bits: bool = field(default=False, metadata={"help": "Load the frozen weights in 4 bits."})

    def __post_init__(self) -> None:
        check_integer("lora_rank", self.lora_rank)
        check_number("lora_dropout", self.lora_dropout, 0, 1)


@dataclass
class DataArguments:
    """Which data, and which of its columns.

    Args:
        dataset: a folder (pictures with a metadata.jsonl, webdataset tars, Parquet), or a Hub id.
        subset: of a data set on the Hub that has several.
        train_split: the rows to train on.
        eval_split: the rows to evaluate on; None for no evaluation.
        columns: {"image": "photo", "text": "caption"}, see `ContrastiveCollator`; a modality that is needed and not
            named is looked for by the usual names, and else is the only column that can hold it.
        text_column: the column of the captions, as `columns` with text alone.
        id_column: see `ContrastiveCollator`.
        crop_scale: smallest share of a picture's area that a random resized crop keeps; None for no augmentation.
    """

    dataset: str = field(metadata={"help": "A folder, or a Hub id."})
    subset: str | None = field(default=None, metadata={"help": "Of a data set that has several."})
    train_split: str = field(default="train", metadata={"help": "The rows to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "The rows to evaluate on."})
    columns: dict[str, str] | None = field(default=None, metadata={"help": "The column of each modality."})
    text_column: str | None = field(default=None, metadata={"help": "The column of the captions."})
    id_column: str | None = field(default=None, metadata={"help": "Rows equal there are partners."})
    crop_scale: float | None = field(default=None, metadata={"help": "Smallest share that a random crop keeps."})

    def __post_init__(self) -> None:
        if self.crop_scale is not None:
            check_number("crop_scale", self.crop_scale, 0, 1, open_low=True)


@dataclass
class ChatDataArguments:
    """Conversations about pictures.

    Args:
        data: JSON or JSON lines, in either form that `ChatCollator` takes.
        pictures: the folder that the pictures' paths begin in.
        max_length: tokens; longer conversations are cut.
    """

    data: str = field(metadata={"help": "JSON or JSON lines of conversations."})
    pictures: str = field(default=".", metadata={"help": "The folder that the pictures' paths begin in."})
    max_length: int = field(default=2048, metadata={"help": "Longer conversations are cut."})

    def __post_init__(self) -> None:
        check_integer("max_length", self.max_length)


def run_recipe(
    path: str | Path, changes: Sequence[str] = (), *, overwrite: bool = False, resume: bool = False
) -> dict[str, float]:
    """Train as a YAML file says; the run's metrics.

    Args:
        path: of a file with a `task`, one of TASKS, and fields of its arguments. The fields under `on_cpu` hold where
            there is no accelerator; `auto` leaves `bf16` and `dataloader_num_workers` to the machine.
        changes: "field=value", or "field.key=value" of a mapping, which take precedence over the file.
        overwrite: replace what an earlier run wrote into output_dir.
        resume: go on from output_dir's newest checkpoint.

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
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    arguments = parsed[-1]
    check_arguments(arguments)
    check_processes(arguments)
    if resume:
        arguments.resume_from_checkpoint = True
    going_on = bool(arguments.resume_from_checkpoint)
    with run_output(Path(arguments.output_dir or "trainer_output"), overwrite=overwrite, resume=going_on):
        return train(*parsed)


def load_model(arguments: ModelArguments, seed: int) -> Any:
    """The model of the class that its files name, with what is trained alone asking for gradients.

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
    """What a trainer is told about its rows.

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
    """The rows of a split.

    Raises:
        ValueError: there are none of that name; naming the recipe's field.
    """
    try:
        return load_rows(data.dataset, data.subset, split=split)
    except ValueError as error:
        raise ValueError(f"{data.dataset}: {field_name} {split!r} cannot be read: {error}") from error


def fit_batch(arguments: TrainingArguments, rows: Any) -> None:
    """Reduce the batch to the rows that there are; of an incomplete batch nothing would be trained."""
    if not hasattr(rows, "__len__"):
        return
    share = len(rows) // max(1, arguments.world_size)
    if 0 < share < arguments.per_device_train_batch_size:
        wanted = arguments.per_device_train_batch_size
        logger.warning("per_device_train_batch_size %d is more than the rows there are: it becomes %d.", wanted, share)
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
    """Train on pictures with captions by all of the model's own losses at once, batch by batch."""
    processor = processor_of(model_arguments.model)
    arguments.remove_unused_columns = False
    hides = hasattr(processor.image_processor, "patch_mask")  # patches, and with them words
    collator = MaskingCollator if hides else ContrastiveCollator
    needed = () if data.columns else ("image", "text")  # some models train on either alone
    options = data_options(data, processor, arguments, collator, needed=needed, all_captions=False)
    if hides:
        options["data_collator"].strangers = options["train_dataset"]
    trainer = RowTrainer(load_model(model_arguments, arguments.seed), arguments, **options)
    return finish(trainer, arguments)


class CaptionTrainer(RowTrainer):
    """Trains a model by the loss of its `labels`."""

    training_inputs = {}

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.args.label_names is None:
            self.label_names = ["labels"]


def train_captions(
    model_arguments: ModelArguments, data: DataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train on pictures a model that writes their captions."""
    processor = processor_of(model_arguments.model)
    arguments.remove_unused_columns = False
    options = data_options(data, processor, arguments, CaptionCollator, all_captions=False)
    trainer = CaptionTrainer(load_model(model_arguments, arguments.seed), arguments, **options)
    return finish(trainer, arguments)


def train_chat(
    model_arguments: ModelArguments, data: ChatDataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train on the answers of conversations about pictures."""
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


def finish(trainer: Trainer, arguments: TrainingArguments) -> dict[str, float]:
    """Train; save the model (adapters as such) with its processor and card and, where matplotlib is installed, an
    image of the run, `curve.png`; the metrics of a last evaluation."""
    metrics = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint).metrics
    trainer.save_model()
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        folder = Path(arguments.output_dir or ".")
        begun: Any = trainer.model
        base = str(begun.config.name_or_path)
        write_card(folder, base_model=hub_name(base), text=f"Fine-tuned from `{Path(base).name}`." if base else "")
        if find_spec("matplotlib"):
            draw_curve(trainer.state.log_history, folder / "curve.png")
    return metrics


TASKS: dict[str, tuple[tuple[Any, ...], Callable[..., dict[str, float]]]] = {
    "contrastive": ((ModelArguments, DataArguments, ContrastiveTrainingArguments), train_contrastive),
    "pairs": ((ModelArguments, DataArguments, TrainingArguments), train_pairs),
    "captions": ((ModelArguments, DataArguments, TrainingArguments), train_captions),
    "chat": ((ModelArguments, ChatDataArguments, TrainingArguments), train_chat),
}
