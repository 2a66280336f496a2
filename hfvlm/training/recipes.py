"""Whole training runs, as a YAML file or a command line describes them."""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import (
    AutoImageProcessor,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hfvlm.inference.adapters import config_of, hub_name, processor_of
from hfvlm.media.rows import load_rows
from hfvlm.presets.cards import write_card
from hfvlm.training.answering import AnswerCollator, SentenceCollator
from hfvlm.training.arguments import ContrastiveTrainingArguments
from hfvlm.training.augmentation import Framed, RandomCropAndFlip, RandomResizedCrop
from hfvlm.training.chat import ChatCollator, ChatTrainer, in_conversation, read_examples
from hfvlm.training.choices import ChoiceCollator, VideoChoiceCollator, choice_accuracies
from hfvlm.training.classification import ClassificationTrainer, LabelCollator, labels_of, load_classifier
from hfvlm.training.columns import training_columns
from hfvlm.training.curves import draw_curve
from hfvlm.training.data import CaptionCollator, ContrastiveCollator, PairCollator
from hfvlm.training.distilling import (
    DistillationTrainer,
    DistilledClassificationTrainer,
    TeacherCollator,
    labels_of_model,
    load_teacher,
)
from hfvlm.training.distortion import ColourDistortion, SimCLRAugmentation
from hfvlm.training.failures import check_arguments, check_processes
from hfvlm.training.masking import MaskingCollator
from hfvlm.training.mixtures import Mixture, weights_of
from hfvlm.training.moved import report, sums_of
from hfvlm.training.optimizers import optimizer_of
from hfvlm.training.outputs import run_output
from hfvlm.training.painting import PaintingCollator
from hfvlm.training.recipe_arguments import (
    AnswerDataArguments,
    ChatDataArguments,
    DataArguments,
    LabelDataArguments,
    ModelArguments,
    RegionDataArguments,
    SentenceDataArguments,
    TeacherArguments,
    ViewDataArguments,
)
from hfvlm.training.recipe_files import checked, read_recipe
from hfvlm.training.recipe_models import class_with_head, load_model, prepared
from hfvlm.training.regions import RegionCollator, RegionTrainer
from hfvlm.training.row_trainer import LabelTrainer, RowTrainer
from hfvlm.training.trainer import ContrastiveTrainer
from hfvlm.training.two_views import TwoViewCollator, TwoViewModel, TwoViewTrainer

logger = logging.getLogger(__name__)


def run_recipe(
    path: str | Path, changes: Sequence[str] = (), *, overwrite: bool = False, resume: bool = False
) -> dict[str, float]:
    """Train as a YAML file defines it; return the run's metrics.

    Args:
        path: of a file with a `task`, one of TASKS or ALIGNMENT, and fields of its arguments. The fields under
            `on_cpu` hold where there is no accelerator; `auto` leaves `bf16` and `dataloader_num_workers` to the
            machine.
        changes: "field=value", or "field.key=value" of a mapping, which take precedence over the file.
        overwrite: replace what an earlier run wrote into output_dir.
        resume: resume from output_dir's newest checkpoint.

    Raises:
        ValueError: the file is no recipe, or has unknown fields or values that cannot be.
        FileExistsError: output_dir has an earlier run, and neither `overwrite` nor `resume` is on.
    """
    recipe = read_recipe(path, changes)
    task = recipe.pop("task", None)
    if task not in (*TASKS, *ALIGNMENT):
        raise ValueError(f"{path}: task {task!r} is none of {', '.join((*TASKS, *ALIGNMENT))}.")
    kinds, train = find_task(task)
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


def data_options(
    data: DataArguments,
    processor: Any,
    arguments: TrainingArguments,
    collator: Callable[..., ContrastiveCollator] = ContrastiveCollator,
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
    resize(processor, data.image_size)
    augment = crops(data, processor.image_processor)
    known: Any = modalities or getattr(processor, "modalities", ("image", "text"))
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    rows, columns = split_of(data, "train_split", needed, known, seed)
    fit_batch(arguments, rows)
    if data.max_length is not None:
        options["max_length"] = data.max_length
    return {
        "data_collator": collator(processor, columns, id_column=data.id_column, augment=augment, **options),
        "train_dataset": rows,
        "eval_dataset": split_of(data, "eval_split", needed, known, seed)[0] if data.eval_split else None,
        "processing_class": processor,
    }


def crops(data: DataArguments, image_processor: Any, *, flip: float = 0.0) -> dict[str, Any]:
    """Return the augmentation of images that the arguments name, if any."""
    if data.crop_scale is None and data.crop_from is None:
        return {}
    edge, resized = image_processor.size["height"], getattr(image_processor, "resized", None)
    if data.crop_scale is not None:
        change: Any = RandomResizedCrop(edge, (data.crop_scale, 1.0), flip=flip)
    else:
        change = RandomCropAndFlip(edge, data.crop_from or edge)
    return {"image": change if resized is None else Framed(change, resized)}


def resize(processor: Any, edge: int | None, part: Any = None) -> None:
    """Let a processor's images, or those of `part`, have another size, of a model that takes any."""
    if edge is not None:
        part = part or processor.image_processor
        part.size = part.checked_value("size", {"height": edge, "width": edge})


def load_split(data: DataArguments, field_name: str, part: Mapping[str, Any]) -> Any:
    """Load the rows of a split of one data set.

    Raises:
        ValueError: there are none of that name; naming the recipe's field.
    """
    path, split = part["path"], getattr(data, field_name)
    split = part.get("split", split) if field_name == "train_split" else split
    try:
        return load_rows(path, part.get("subset", data.subset), split=split)
    except ValueError as error:
        raise ValueError(f"{path}: {field_name} {split!r} cannot be read: {error}") from error


def split_of(
    data: DataArguments, field_name: str, needed: Sequence[str], modalities: Sequence[str], seed: int
) -> tuple[Any, dict[str, str]]:
    """Load the rows of a split, of one data set or of a mixture, whose rows are by modality.

    Returns:
        The rows, and the column of each modality.

    Raises:
        ValueError: there are none of that name; naming the recipe's field.
    """
    text = {"text": data.text_column} if data.text_column else {}
    parts = [{"path": data.dataset}] if isinstance(data.dataset, str) else data.dataset or []
    loaded, found = [], []
    for part in parts:
        rows = load_split(data, field_name, part)
        own: Any = part.get("columns", data.columns)
        given = dict(own or {}) | text
        wanted = [name for name in needed if not (name == "image" and "video" in given)]
        found.append(training_columns(rows, given, needed=wanted, modalities=modalities, source=part["path"]))
        loaded.append(rows)
    if isinstance(data.dataset, str):
        return loaded[0], found[0]
    views = [partial(by_modality, columns, data.id_column) for columns in found]
    mixed = Mixture(loaded, weights_of(parts, data.mixing, loaded), seed=seed, views=views)
    return mixed, {modality: modality for columns in found for modality in columns}


def by_modality(columns: Mapping[str, str], id_column: str | None, row: Mapping[str, Any]) -> dict[str, Any]:
    """Name the columns of a row after their modalities."""
    own = {} if id_column is None else {id_column: row[id_column]}
    return own | {modality: row[column] for modality, column in columns.items()}


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
    return finish(trainer, arguments, model_arguments)


def train_distilled(
    model_arguments: ModelArguments,
    data: DataArguments,
    teaching: TeacherArguments,
    arguments: ContrastiveTrainingArguments,
) -> dict[str, float]:
    """Train a dual encoder to compare the rows of large batches as its teacher does."""
    if teaching.teacher is None:
        raise ValueError("distillation needs a teacher: the folder of a dual encoder.")
    options = data_options(data, processor_of(model_arguments.model), arguments)
    own = options["data_collator"]
    theirs = ContrastiveCollator(processor_of(teaching.teacher), own.columns, **own.options)
    teacher = load_teacher(
        teaching.teacher, None, share=teaching.teacher_share, temperature=teaching.teacher_temperature
    )
    options |= {"data_collator": TeacherCollator(own, theirs), "teacher": teacher}
    trainer = DistillationTrainer(load_model(model_arguments, arguments.seed), arguments, **options)
    return finish(trainer, arguments, model_arguments)


def train_pairs(
    model_arguments: ModelArguments, data: DataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train on images with captions by all of the model's own losses at once, batch by batch."""
    processor = processor_of(model_arguments.model)
    arguments.remove_unused_columns = False
    hides = hasattr(processor.image_processor, "patch_mask")  # patches, and with them words
    model = load_model(model_arguments, arguments.seed)
    names_pairs = data.id_column is not None and "pair_ids" in signature(model.forward).parameters
    collator = MaskingCollator if hides else PairCollator if names_pairs else ContrastiveCollator
    needed = () if data.columns else ("image", "text")  # some models train on either by itself
    options = data_options(data, processor, arguments, collator, needed=needed, all_captions=False)
    if hides:
        options["data_collator"].negatives = options["train_dataset"]
    trainer = RowTrainer(model, arguments, **options)
    return finish(trainer, arguments, model_arguments)


def train_captions(
    model_arguments: ModelArguments, data: DataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train a model that generates the captions of images."""
    processor = processor_of(model_arguments.model)
    arguments.remove_unused_columns = False
    options = data_options(data, processor, arguments, CaptionCollator, all_captions=False)
    trainer = LabelTrainer(load_model(model_arguments, arguments.seed), arguments, **options)
    return finish(trainer, arguments, model_arguments)


def train_chat(
    model_arguments: ModelArguments, data: ChatDataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train on the answers of conversations about images."""
    processor = processor_of(model_arguments.model)
    arguments.remove_unused_columns = False
    if data.conversation is not None:
        processor = in_conversation(processor, data.conversation)
    resize(processor, data.image_size)
    rows: Any
    if isinstance(data.data, str):
        rows = read_examples(data.data, data.pictures)
    else:
        files = data.data or []
        several = [read_examples(part["path"], part.get("pictures", data.pictures)) for part in files]
        rows = Mixture(several, weights_of(files, data.mixing, several), seed=arguments.seed)
    trainer = ChatTrainer(
        load_model(model_arguments, arguments.seed),
        arguments,
        ChatCollator(processor, max_length=data.max_length, image_place=data.image_place, seed=arguments.seed),
        train_dataset=rows,
        processing_class=processor,
    )
    return finish(trainer, arguments, model_arguments)


def train_classification(
    model_arguments: ModelArguments,
    data: LabelDataArguments,
    teaching: TeacherArguments,
    arguments: TrainingArguments,
) -> dict[str, float]:
    """Train a linear layer on a vision tower, or the tower with it, on labelled images, or on what a teacher makes of
    images."""
    source, processor = str(data.dataset), image_processor_of(model_arguments.model)
    arguments.remove_unused_columns = False
    resize(processor, data.image_size, part=processor)
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    rows, columns = split_of(data, "train_split", ("image",), ("image",), seed)
    labelled = data.label_column in (rows.features or {})
    if teaching.teacher is None or teaching.teacher_share < 1 or labelled:
        numbers, names = labels_of(rows, data.label_column, source)
    else:
        names = labels_of_model(config_of(teaching.teacher))
        numbers = {key: i for i, name in enumerate(names) for key in (i, name)}
    fit_batch(arguments, rows)
    augment = crops(data, processor, flip=0.5 if data.flip else 0.0)
    where = columns["image"], data.label_column, numbers
    collator: Any = LabelCollator(processor, *where, augment=augment, labelled=labelled)
    kind, options = ClassificationTrainer, {}
    if teaching.teacher is not None:
        theirs = LabelCollator(image_processor_of(teaching.teacher), *where)
        share, temperature = teaching.teacher_share, teaching.teacher_temperature
        options["teacher"] = load_teacher(teaching.teacher, names, share=share, temperature=temperature)
        kind, collator = DistilledClassificationTrainer, TeacherCollator(collator, theirs)
    set_seed(arguments.seed)  # the last layer begins at random
    trainer = kind(
        prepared(load_classifier(model_arguments.model, names), model_arguments),
        arguments,
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=split_of(data, "eval_split", ("image",), ("image",), seed)[0] if data.eval_split else None,
        processing_class=processor,
        **options,
    )
    return finish(trainer, arguments, model_arguments)


def image_processor_of(folder: str) -> Any:
    """Return the image processor of a model; a classifier's folder may have no other.

    Raises:
        ValueError: the model takes no images.
    """
    try:
        return AutoImageProcessor.from_pretrained(folder)
    except OSError:  # of an adapter, or of a model of something else
        processor = processor_of(folder)
    if (part := getattr(processor, "image_processor", None)) is None:
        kinds = ", ".join(processor.modalities)
        raise ValueError(f"{folder}: {type(processor).__name__} prepares {kinds}, and no images.")
    return part


def train_views(
    model_arguments: ModelArguments, data: ViewDataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train a vision tower without labels: two views of an image belong together."""
    processor = image_processor_of(model_arguments.model)
    arguments.remove_unused_columns = False
    resize(processor, data.image_size, part=processor)
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    rows, columns = split_of(data, "train_split", ("image",), ("image",), seed)
    fit_batch(arguments, rows)
    scale = (0.08 if data.crop_scale is None else data.crop_scale, 1.0)
    colours = ColourDistortion(data.colour_strength)
    view = SimCLRAugmentation(processor.size["height"], scale, colours, data.blur)
    set_seed(arguments.seed)  # the head begins at random
    tower = prepared(load_classifier(model_arguments.model, ["image"]), model_arguments)
    trainer = TwoViewTrainer(
        TwoViewModel(tower, data.head_size, data.temperature),
        arguments,
        TwoViewCollator(processor, columns["image"], view),
        train_dataset=rows,
        eval_dataset=split_of(data, "eval_split", ("image",), ("image",), seed)[0] if data.eval_split else None,
    )
    return finish(trainer, arguments, model_arguments)


def train_answers(
    model_arguments: ModelArguments, data: AnswerDataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train a model that answers questions about images."""
    processor = processor_of(model_arguments.model)
    arguments.remove_unused_columns = False
    if not hasattr(processor, "answers"):
        raise ValueError(f"{model_arguments.model}: {type(processor).__name__} has no `answers`; BLIP's has.")
    collator = partial(AnswerCollator, answer_column=data.answer_column)
    options = data_options(data, processor, arguments, collator)
    trainer = LabelTrainer(load_model(model_arguments, arguments.seed), arguments, **options)
    return finish(trainer, arguments, model_arguments)


def train_sentences(
    model_arguments: ModelArguments, data: SentenceDataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train a model that classifies sentences about several images as true or false."""
    processor = processor_of(model_arguments.model)
    arguments.remove_unused_columns = False
    model = load_model(model_arguments, arguments.seed)
    if not hasattr(model, "images_per_text"):
        raise ValueError(
            f"{model_arguments.model}: {type(model).__name__} takes no several images for a sentence; "
            "model_class HfvlmBLIPForVisualReasoning does."
        )
    collator = partial(SentenceCollator, label_column=data.label_column)
    trainer = ClassificationTrainer(model, arguments, **data_options(data, processor, arguments, collator))
    return finish(trainer, arguments, model_arguments)


def train_choices(
    model_arguments: ModelArguments, data: DataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train a model that chooses among answers to questions about images or, where the model hears, videos."""
    processor = processor_of(model_arguments.model)
    resize(processor, data.image_size)
    chosen, options = model_arguments.model_class, {} if data.max_length is None else {"max_length": data.max_length}
    kind = class_with_head(model_arguments.model, "AutoModelForMultipleChoice") if chosen is None else None
    model = load_model(model_arguments, arguments.seed, kind)
    takes = VideoChoiceCollator if "audio" in model.input_modalities else ChoiceCollator
    collator = takes(processor, data.columns, **options)
    splits = named_splits(data, arguments)
    trainer = LabelTrainer(model, arguments, collator, compute_metrics=choice_accuracies, **splits)
    return finish_with(processor, trainer, arguments, model_arguments)


def train_regions(
    model_arguments: ModelArguments, data: RegionDataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train a model that reads texts and the regions of images on one of its tasks."""
    processor = processor_of(model_arguments.model)
    kind = class_with_head(model_arguments.model, "AutoModelForVisualQuestionAnswering")
    model = load_model(model_arguments, arguments.seed, kind)
    classes = {"answer": model.config.num_answers, "gqa": model.config.num_gqa_answers}
    where = data.regions, data.columns, classes, data.annotated_regions
    collator = RegionCollator(processor, data.region_task, *where)
    trainer = RegionTrainer(data.region_task, model, arguments, collator, **named_splits(data, arguments))
    return finish_with(processor, trainer, arguments, model_arguments)


def train_painting(
    model_arguments: ModelArguments, data: DataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train a model that is shown tasks by pairs, on rows with an image, its painted target and the name of a task."""
    processor, model = processor_of(model_arguments.model), load_model(model_arguments, arguments.seed)
    splits = named_splits(data, arguments)
    scale = 0.3 if data.crop_scale is None else data.crop_scale
    shown = splits["train_dataset"]
    collator = PaintingCollator(processor, model.config.patch_size, shown, data.columns, crop_scale=scale)
    trainer = RowTrainer(model, arguments, collator, **splits)
    return finish_with(processor, trainer, arguments, model_arguments)


def named_splits(data: DataArguments, arguments: TrainingArguments) -> dict[str, Any]:
    """Load the rows of one data set, whose columns a collator of its own reads.

    Raises:
        ValueError: there are several.
    """
    if not isinstance(data.dataset, str):
        raise ValueError(f"dataset must be one data set, whose columns this task names, not {data.dataset}.")
    arguments.remove_unused_columns = False
    source = {"path": data.dataset}
    rows = load_split(data, "train_split", source)
    fit_batch(arguments, rows)
    return {
        "train_dataset": rows,
        "eval_dataset": load_split(data, "eval_split", source) if data.eval_split else None,
    }


def finish_with(
    processor: Any, trainer: Any, arguments: TrainingArguments, model_arguments: ModelArguments
) -> dict[str, float]:
    """Do as `finish`, and save a processor that a trainer does not: transformers looks for a tokenizer in it."""
    metrics = finish(trainer, arguments, model_arguments)
    if trainer.is_world_process_zero():
        processor.save_pretrained(arguments.output_dir or ".")
    return metrics


def finish(
    trainer: Any, arguments: TrainingArguments, model_arguments: ModelArguments | None = None
) -> dict[str, float]:
    """Train, and save the model (adapters as such) with its processor and card, the names of the parameters that
    moved, `moved.json`, and, where matplotlib is installed, an image of the run, `curve.png`; return the metrics of a
    last evaluation."""
    if model_arguments is not None:
        decay: Any = model_arguments.layer_decay
        trainer.whole_rate = model_arguments.whole_rate
        if model_arguments.optimizer is not None:
            trainer.optimizer_cls_and_kwargs = optimizer_of(model_arguments.optimizer, arguments)
        trainer.layer_decay = {tower: float(rate) for tower, rate in (decay or {}).items()}
    before = sums_of(trainer.model)
    metrics = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint).metrics
    trainer.save_model()
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        folder = Path(arguments.output_dir or ".")
        model: Any = trainer.model
        report(before, trainer.accelerator.unwrap_model(model), folder)
        base = str(model.config.name_or_path)
        write_card(folder, base_model=hub_name(base), text=f"Fine-tuned from `{Path(base).name}`." if base else "")
        if find_spec("matplotlib"):
            draw_curve(trainer.state.log_history, folder / "curve.png")
    return metrics


TASKS: dict[str, tuple[tuple[Any, ...], Callable[..., dict[str, float]]]] = {
    "contrastive": ((ModelArguments, DataArguments, ContrastiveTrainingArguments), train_contrastive),
    "distillation": ((ModelArguments, DataArguments, TeacherArguments, ContrastiveTrainingArguments), train_distilled),
    "pairs": ((ModelArguments, DataArguments, TrainingArguments), train_pairs),
    "captions": ((ModelArguments, DataArguments, TrainingArguments), train_captions),
    "answers": ((ModelArguments, AnswerDataArguments, TrainingArguments), train_answers),
    "sentences": ((ModelArguments, SentenceDataArguments, TrainingArguments), train_sentences),
    "classification": (
        (ModelArguments, LabelDataArguments, TeacherArguments, TrainingArguments),
        train_classification,
    ),
    "views": ((ModelArguments, ViewDataArguments, TrainingArguments), train_views),
    "painting": ((ModelArguments, DataArguments, TrainingArguments), train_painting),
    "choices": ((ModelArguments, DataArguments, TrainingArguments), train_choices),
    "regions": ((ModelArguments, RegionDataArguments, TrainingArguments), train_regions),
    "chat": ((ModelArguments, ChatDataArguments, TrainingArguments), train_chat),
}
# Tasks of `hfvlm.training.alignment`, some of whose arguments are TRL's, which takes seconds to import.
ALIGNMENT = ("reward", "preferences", "rloo")


def find_task(name: str) -> tuple[tuple[Any, ...], Callable[..., dict[str, float]]]:
    """Return the dataclasses that share a task's fields among them, and the function that trains.

    Raises:
        ImportError: TRL is not installed, and the task needs it.
    """
    return TASKS[name] if name in TASKS else importlib.import_module("hfvlm.training.alignment").find_task(name)
