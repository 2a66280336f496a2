"""The fields of recipes that `transformers.TrainingArguments` lacks."""

from dataclasses import dataclass, field
from typing import Any

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.training.arguments import rates_from
from hfvlm.training.failures import check_values
from hfvlm.training.mixtures import MIXINGS, check_mixture
from hfvlm.training.optimizers import OPTIMIZERS


@dataclass
class ModelArguments:
    """Which model is trained, and which of its weights.

    Args:
        model: a folder or a Hub id.
        model_class: the class that begins with the folder's weights, as HfvlmBLIPForQuestionAnswering; None for the
            folder's own.
        optimizer: "lamb" or "lars", for batches of thousands; None for the one that `optim` names.
        modalities: [image, audio]: only these towers are loaded, of a model that has more than two.
        trained_parts: [projector, language_model]: all else is frozen; None trains all weights. `own` are the weights
            that a model's authors train, where it has such a choice (`freeze_pretrained`).
        layer_decay: {vision: 0.95}: the learning rate of each layer of a tower is so much of the next one's.
        lora_recipe: as "vision+text+scale", for `hfvlm.lora`: adapters are trained in place of the weights.
        lora_rank: of the adapters.
        lora_dropout: on the adapters' inputs.
        lora_alpha: numerator of the adapters' scale; None for twice the rank.
        lora_layers: names of the linear layers that are adapted; None for the architecture's own.
        lora_whole: names of modules that are trained in full, next to those of the recipe.
        whole_rate: learning rate of what is trained in full next to adapters, relative to theirs.
        four_bits: load the frozen weights in 4 bits (QLoRA, https://arxiv.org/abs/2305.14314).
    """

    model: str = field(metadata={"help": "A folder or a Hub id."})
    model_class: str | None = field(default=None, metadata={"help": "The class that begins with its weights."})
    optimizer: str | None = field(default=None, metadata={"help": f"One of {', '.join(OPTIMIZERS)}."})
    modalities: list[str] | None = field(default=None, metadata={"help": "The towers to load, of more than two."})
    trained_parts: list[str] | None = field(default=None, metadata={"help": "As projector; all else is frozen."})
    layer_decay: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Factors of learning rates from layer to layer, as {"vision": 0.95}.'}
    )
    lora_recipe: str | None = field(default=None, metadata={"help": "As vision+text+scale: adapters are trained."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' inputs."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Of the adapters' scale; None for twice the rank."})
    lora_layers: list[str] | None = field(default=None, metadata={"help": "The linear layers that are adapted."})
    lora_whole: list[str] | None = field(default=None, metadata={"help": "Modules that are trained in full."})
    whole_rate: float = field(default=1.0, metadata={"help": "Relative learning rate of what is trained in full."})
    four_bits: bool = field(default=False, metadata={"help": "Load the frozen weights in 4 bits."})

    def __post_init__(self) -> None:
        check_values(vars(self))
        if isinstance(self.layer_decay, str):  # of a command line
            self.layer_decay = rates_from(self.layer_decay, "layer_decay")
        if self.optimizer not in (None, *OPTIMIZERS):
            raise ValueError(f"optimizer {self.optimizer!r} is none of {', '.join(OPTIMIZERS)}.")
        for tower, rate in (self.layer_decay or {}).items():
            check_number(f"layer_decay of {tower}", rate, 0, 1, open_low=True)


@dataclass
class DataArguments:
    """Which data, and which of its columns.

    Args:
        dataset: a folder (images with a metadata.jsonl, webdataset tars, Parquet), or a Hub id. Several make a
            mixture: [{path: photos, weight: 0.2}, {path: pages, weight: 1}], each with a `subset`, a `split` and
            `columns` of its own where they differ.
        mixing: of several, "weights" draws as many rows of each as its weight says, "proportional" as many as its
            weight times its number of rows, "round_robin" one of each in turn, until every row of all was drawn; the
            rows of smaller ones come again.
        subset: of a data set on the Hub that has several.
        train_split: the rows to train on.
        eval_split: the rows to evaluate on; None for no evaluation.
        columns: {"image": "photo", "text": "caption"}, see `ContrastiveCollator`; a modality that is needed and not
            named is looked for by the usual names, and else is the only column that can hold it.
        text_column: the column of the captions, as `columns` with text alone.
        id_column: see `ContrastiveCollator`.
        crop_scale: smallest share of an image's area that a random resized crop takes; None for no augmentation.
        crop_from: pixels of an image's shorter edge, of which a square of the model's size is cut by chance, and
            mirrored half of the time, as ALIGN's; it goes without crop_scale.
        max_length: tokens of a text; longer ones are cut. None for the processor's own.
        image_size: pixels of the square that images become; None for the processor's own.
    """

    dataset: list[dict[str, Any]] | str | None = field(metadata={"help": "A folder, or a Hub id."})
    subset: str | None = field(default=None, metadata={"help": "Of a data set that has several."})
    train_split: str = field(default="train", metadata={"help": "The rows to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "The rows to evaluate on."})
    mixing: str = field(default="weights", metadata={"help": f"Of several data sets: {', '.join(MIXINGS)}."})
    columns: dict[str, str] | None = field(default=None, metadata={"help": "The column of each modality."})
    text_column: str | None = field(default=None, metadata={"help": "The column of the captions."})
    id_column: str | None = field(default=None, metadata={"help": "Rows with equal ids are positives."})
    crop_scale: float | None = field(default=None, metadata={"help": "Smallest share that a random crop takes."})
    crop_from: int | None = field(default=None, metadata={"help": "Shorter edge before a random crop."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a text; longer ones are cut."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels of the square that images become."})

    def __post_init__(self) -> None:
        check_values(vars(self))
        check_mixture("dataset", self.dataset, self.mixing, ("subset", "split", "columns"))
        if self.crop_from is not None and self.crop_scale is not None:
            raise ValueError("crop_from and crop_scale are two ways to crop: leave one out.")


@dataclass
class ViewDataArguments(DataArguments):
    """Which images, and how two views of one differ (SimCLR); `crop_scale` is that of both, by default 0.08.

    Args:
        colour_strength: of the distortion of colours, see `ColourDistortion`.
        blur: probability of blurring a view.
        temperature: what similarities are divided by.
        head_size: of what the head makes of a view.
    """

    colour_strength: float = field(default=1.0, metadata={"help": "Of the distortion of colours."})
    blur: float = field(default=0.5, metadata={"help": "Probability of blurring a view."})
    temperature: float = field(default=0.1, metadata={"help": "What similarities are divided by."})
    head_size: int = field(default=128, metadata={"help": "Of what the head makes of a view."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("colour_strength", self.colour_strength, 0)
        check_number("blur", self.blur, 0, 1)
        check_number("temperature", self.temperature, 0, open_low=True)
        check_integer("head_size", self.head_size)


@dataclass
class TeacherArguments:
    """Which model a student learns from, if any.

    Args:
        teacher: a folder or a Hub id: of a classifier in classification, of a dual encoder in contrastive training.
        teacher_share: the teacher's part in the loss; the rest is the student's own loss, by labels or pairs. With 1,
            a classifier needs no labels, and has the teacher's.
        teacher_temperature: what the logits of a classifier and of its teacher are divided by.
    """

    teacher: str | None = field(default=None, metadata={"help": "A folder or a Hub id to learn from."})
    teacher_share: float = field(default=1.0, metadata={"help": "The teacher's part in the loss."})
    teacher_temperature: float = field(default=1.0, metadata={"help": "What a classifier's logits are divided by."})

    def __post_init__(self) -> None:
        check_number("teacher_share", self.teacher_share, 0, 1)
        check_number("teacher_temperature", self.teacher_temperature, 0, open_low=True)


@dataclass
class AnswerDataArguments(DataArguments):
    """Which images with questions and answers; `columns` names those of the images ("image") and questions ("text").

    Args:
        answer_column: the answers, of each row a text or a list of texts.
    """

    answer_column: str = field(default="answers", metadata={"help": "The column of the answers."})


@dataclass
class SentenceDataArguments(DataArguments):
    """Which sentences about two images; `columns` names those of the lists of images ("image") and sentences ("text").

    Args:
        label_column: whether the sentence is true.
    """

    label_column: str = field(default="label", metadata={"help": "The column of what is true."})


@dataclass
class LabelDataArguments(DataArguments):
    """Which labelled images; `columns` names that of the images.

    Args:
        label_column: the labels, numbers or names.
        flip: mirror half of the images in training.
    """

    label_column: str = field(default="label", metadata={"help": "The column of the labels."})
    flip: bool = field(default=False, metadata={"help": "Mirror half of the images in training."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.dataset, str):
            raise ValueError("dataset must be one data set: labels of several have no numbers in common.")


@dataclass
class RegionDataArguments(DataArguments):
    """Which texts about regions of images; `columns` are those of `RegionCollator`.

    Args:
        regions: a folder of npy files, or an lmdb file, of the authors' kind.
        region_task: name of one of the model's tasks, as "vqa" or "refcoco".
        annotated_regions: likewise a folder or a file, of regions that people drew, of tasks that are about these.
    """

    regions: str = field(default="regions", metadata={"help": "A folder of npy files, or an lmdb file."})
    region_task: str = field(default="vqa", metadata={"help": "One of the model's tasks, as vqa or refcoco."})
    annotated_regions: str | None = field(default=None, metadata={"help": "As regions, of those that people drew."})


@dataclass
class ChatDataArguments:
    """Conversations about images.

    Args:
        data: JSON or JSON lines, in either form that `ChatCollator` takes. Several files make a mixture:
            [{path: chats.json, weight: 1}, {path: captions.json, weight: 0.5}], each with a folder of
            images of its own where they differ.
        mixing: see `DataArguments`.
        pictures: the folder that the images' paths begin in.
        max_length: tokens; longer conversations are cut.
        image_place: of images without a placeholder in their conversation, first or random, see `ChatCollator`.
        conversation: the name of another form of conversations that the processor knows; None for its own.
        image_size: pixels of the square that images become; None for the processor's own.
    """

    data: list[dict[str, Any]] | str | None = field(metadata={"help": "JSON or JSON lines of conversations."})
    mixing: str = field(default="weights", metadata={"help": f"Of several files: {', '.join(MIXINGS)}."})
    pictures: str = field(default=".", metadata={"help": "The folder that the images' paths begin in."})
    max_length: int = field(default=2048, metadata={"help": "Longer conversations are cut."})
    image_place: str = field(default="first", metadata={"help": "Of images without a placeholder: first, random."})
    conversation: str | None = field(default=None, metadata={"help": "Another form that the processor knows."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels of the square that images become."})

    def __post_init__(self) -> None:
        check_values(vars(self))
        check_mixture("data", self.data, self.mixing, ("pictures",))


@dataclass
class PreferenceDataArguments:
    """Pairs of answers about images, of which one is preferred.

    Args:
        data: JSON or JSON lines of pairs, as `hfvlm.training.chat.PreferenceCollator` takes them.
        eval_data: others, of which the loss and the accuracy are measured; None for no evaluation.
        pictures: the folder that the images' paths begin in.
    """

    data: str = field(metadata={"help": "JSON or JSON lines of pairs of answers."})
    eval_data: str | None = field(default=None, metadata={"help": "Other pairs, to evaluate on."})
    pictures: str = field(default=".", metadata={"help": "The folder that the images' paths begin in."})


@dataclass
class RewardArguments:
    """Prompts about images, and the reward of the answers that a model gives to them.

    Args:
        data: JSON or JSON lines of `{"prompt": ..., "images": [...]}`, each prompt a text or a list of messages.
        reward_model: a folder, or an adapter, as the task "reward" writes them.
        pictures: the folder that the images' paths begin in.
        reward_batch_size: answers that are scored at once.
    """

    data: str = field(metadata={"help": "JSON or JSON lines of prompts."})
    reward_model: str = field(metadata={"help": "A folder that the task `reward` wrote."})
    pictures: str = field(default=".", metadata={"help": "The folder that the images' paths begin in."})
    reward_batch_size: int = field(default=16, metadata={"help": "Answers that are scored at once."})

    def __post_init__(self) -> None:
        check_values(vars(self))
