"""Whole training runs that are described in a YAML file, or on a command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoModel, AutoProcessor, HfArgumentParser, set_seed

from hfvlm.lora_recipes import lora
from hfvlm.media.rows import load_rows
from hfvlm.training.arguments import ContrastiveTrainingArguments
from hfvlm.training.augmentation import RandomResizedCrop
from hfvlm.training.curves import draw_curve
from hfvlm.training.data import ContrastiveCollator
from hfvlm.training.trainer import ContrastiveTrainer


@dataclass
class ModelArguments:
    """Which model, and how much of it is trained.

    Args:
        model: a folder or a Hub id.
        modalities: [image, audio]: only these towers are loaded, of a model that has more than two.
        lora_recipe: as "vision+text+scale", for `hfvlm.lora`; None trains all weights.
        lora_rank: of the adapters.
        lora_dropout: on the adapters' inputs.
    """

    model: str = field(metadata={"help": "A folder or a Hub id."})
    modalities: list[str] | None = field(default=None, metadata={"help": "The towers to load, of more than two."})
    lora_recipe: str | None = field(default=None, metadata={"help": "As vision+text+scale; without it all trains."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' inputs."})


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


def run_recipe(path: str | Path, changes: Sequence[str] = ()) -> dict[str, float]:
    """Train as a YAML file says; the last evaluation's metrics.

    Args:
        path: of a file with the fields of ModelArguments, DataArguments and ContrastiveTrainingArguments.
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
    return train_contrastive(*parse(recipe, str(path)))


def parse(recipe: Mapping[str, Any], name: str) -> tuple[Any, Any, Any]:
    """Fields by name -> the three kinds of arguments."""
    kinds = (ModelArguments, DataArguments, ContrastiveTrainingArguments)
    try:
        return HfArgumentParser(kinds).parse_dict(dict(recipe))  # type: ignore[return-value, arg-type]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error


def train_contrastive(
    model_arguments: ModelArguments, data: DataArguments, arguments: ContrastiveTrainingArguments
) -> dict[str, float]:
    """Train, save the model with its processor (adapters are saved as such) and, where matplotlib is installed, a
    picture of the run, `curve.png`; the metrics of a last evaluation."""
    set_seed(arguments.seed)  # adapters begin at random
    processor = AutoProcessor.from_pretrained(model_arguments.model)
    towers = {"modalities": model_arguments.modalities} if model_arguments.modalities else {}
    model = AutoModel.from_pretrained(model_arguments.model, **towers)
    augment = {}
    if data.crop_scale is not None:
        size = processor.image_processor.size["height"]
        augment["image"] = RandomResizedCrop(size, (data.crop_scale, 1.0))
    if model_arguments.lora_recipe is not None:
        model = lora(
            model, model_arguments.lora_recipe, r=model_arguments.lora_rank, dropout=model_arguments.lora_dropout
        )
    trainer = ContrastiveTrainer(
        model,
        arguments,
        ContrastiveCollator(processor, data.columns, id_column=data.id_column, augment=augment),
        train_dataset=load_rows(data.dataset, data.subset, split=data.train_split),
        eval_dataset=load_rows(data.dataset, data.subset, split=data.eval_split) if data.eval_split else None,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate() if data.eval_split else {}
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero() and find_spec("matplotlib"):
        draw_curve(trainer.state.log_history, Path(arguments.output_dir or ".") / "curve.png")
    return metrics
