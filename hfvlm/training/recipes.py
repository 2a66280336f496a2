"""Whole training runs that are described in a YAML file, or on a command line."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hfvlm.lora_recipes import lora
from hfvlm.media.rows import load_rows
from hfvlm.ranges import check_integer, check_number
from hfvlm.registry import find_class
from hfvlm.training.arguments import ContrastiveTrainingArguments
from hfvlm.training.augmentation import RandomResizedCrop
from hfvlm.training.chat import ChatCollator, ChatTrainer, read_examples
from hfvlm.training.curves import draw_curve
from hfvlm.training.data import CaptionCollator, ContrastiveCollator
from hfvlm.training.failures import check_arguments, check_processes
from hfvlm.training.masking import MaskingCollator
from hfvlm.training.row_trainer import RowTrainer
from hfvlm.training.trainer import ContrastiveTrainer


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
        columns: {"image": "photo", "text": "caption"}, see `ContrastiveCollator`.
        id_column: see `ContrastiveCollator`.
        crop_scale: smallest share of a picture's area that a random resized crop keeps; None for no augmentation.
    """

    dataset: str = field(metadata={"help": "A folder, or a Hub id."})
    subset: str | None = field(default=None, metadata={"help": "Of a data set that has several."})
    train_split: str = field(default="train", metadata={"help": "The rows to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "The rows to evaluate on."})
    columns: dict[str, str] | None = field(default=None, metadata={"help": "The column of each modality."})
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


def run_recipe(path: str | Path, changes: Sequence[str] = ()) -> dict[str, float]:
    """Train as a YAML file says; the run's metrics.

    Args:
        path: of a file with a `task`, one of TASKS, and fields of its arguments.
        changes: "field=value", which take precedence over the file.

    Raises:
        ValueError: the file is no recipe, or has unknown fields.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({error}).") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe is a list of `field: value`.")
    for change in changes:
        name, separator, value = change.partition("=")
        if not separator:
            raise ValueError(f"{change!r}: changes are written as field=value.")
        recipe[name] = yaml.safe_load(value)
    task = recipe.pop("task", None)
    if task not in TASKS:
        raise ValueError(f"{path}: task {task!r} is none of {', '.join(TASKS)}.")
    kinds, train = TASKS[task]
    try:
        parsed = HfArgumentParser(kinds).parse_dict(recipe)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    check_arguments(parsed[-1])
    check_processes(parsed[-1])
    return train(*parsed)


def load_model(arguments: ModelArguments, seed: int) -> Any:
    """The model of the class that its files name, with what is trained alone asking for gradients.

    Raises:
        ValueError: hfvlm has no such class, or the model no such part.
    """
    set_seed(seed)  # adapters begin at random
    names = AutoConfig.from_pretrained(arguments.model).architectures or ["nothing"]
    kind = find_class(names[0])
    if kind is None:
        raise ValueError(f"{arguments.model}: its config.json names {names[0]}, which is no model of hfvlm.")
    options: dict[str, Any] = {"modalities": arguments.modalities} if arguments.modalities else {}
    if arguments.four_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = kind.from_pretrained(arguments.model, **options)
    if arguments.trained_parts is not None:
        for parameter in model.parameters():
            parameter.requires_grad_(requires_grad=False)
        for name in arguments.trained_parts:
            if not hasattr(model, name):
                parts = ", ".join(name for name, _ in model.named_children())
                raise ValueError(f"trained_parts: {names[0]} has no {name}; it has {parts}.")
            getattr(model, name).requires_grad_(requires_grad=True)
    if arguments.lora_recipe is not None:
        model = lora(model, arguments.lora_recipe, r=arguments.lora_rank, dropout=arguments.lora_dropout)
    return model


def data_options(
    data: DataArguments, processor: Any, collator: type[ContrastiveCollator] = ContrastiveCollator, **options: Any
) -> dict[str, Any]:
    """What a trainer is told about its rows; `options` are the collator's."""
    augment = {}
    if data.crop_scale is not None:
        augment["image"] = RandomResizedCrop(processor.image_processor.size["height"], (data.crop_scale, 1.0))
    return {
        "data_collator": collator(processor, data.columns, id_column=data.id_column, augment=augment, **options),
        "train_dataset": load_rows(data.dataset, data.subset, split=data.train_split),
        "eval_dataset": load_rows(data.dataset, data.subset, split=data.eval_split) if data.eval_split else None,
        "processing_class": processor,
    }


def train_contrastive(
    model_arguments: ModelArguments, data: DataArguments, arguments: ContrastiveTrainingArguments
) -> dict[str, float]:
    """Compare the rows of large batches with one another, with a ContrastiveTrainer."""
    processor = AutoProcessor.from_pretrained(model_arguments.model)
    trainer = ContrastiveTrainer(
        load_model(model_arguments, arguments.seed),
        arguments,
        **data_options(data, processor),
    )
    return finish(trainer, arguments)


def train_pairs(
    model_arguments: ModelArguments, data: DataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train on pictures with captions by all of the model's own losses at once, batch by batch."""
    processor = AutoProcessor.from_pretrained(model_arguments.model)
    arguments.remove_unused_columns = False
    hides = hasattr(processor.image_processor, "patch_mask")  # patches, and with them words
    collator = MaskingCollator if hides else ContrastiveCollator
    options = data_options(data, processor, collator, all_captions=False)
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
    processor = AutoProcessor.from_pretrained(model_arguments.model)
    arguments.remove_unused_columns = False
    options = data_options(data, processor, CaptionCollator, all_captions=False)
    trainer = CaptionTrainer(load_model(model_arguments, arguments.seed), arguments, **options)
    return finish(trainer, arguments)


def train_chat(
    model_arguments: ModelArguments, data: ChatDataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train on the answers of conversations about pictures."""
    processor = AutoProcessor.from_pretrained(model_arguments.model)
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
    """Train, save the model with its processor (adapters are saved as such) and, where matplotlib is installed, a
    picture of the run, `curve.png`; the metrics of a last evaluation."""
    metrics = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint).metrics
    trainer.save_model()
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero() and find_spec("matplotlib"):
        draw_curve(trainer.state.log_history, Path(arguments.output_dir or ".") / "curve.png")
    return metrics


TASKS: dict[str, tuple[tuple[Any, ...], Callable[..., dict[str, float]]]] = {
    "contrastive": ((ModelArguments, DataArguments, ContrastiveTrainingArguments), train_contrastive),
    "pairs": ((ModelArguments, DataArguments, TrainingArguments), train_pairs),
    "captions": ((ModelArguments, DataArguments, TrainingArguments), train_captions),
    "chat": ((ModelArguments, ChatDataArguments, TrainingArguments), train_chat),
}
