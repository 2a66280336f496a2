"""Alignment after instruction, as recipes describe it: directly by preferences (DPO), or by a reward that learns from
them and reinforcement learning with it (RLOO)."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainingArguments

from hfvlm.inference.adapters import adapter_settings, processor_of
from hfvlm.media.sources import import_extra
from hfvlm.training.chat import PreferenceCollator, read_example, read_examples, turns_of
from hfvlm.training.recipe_arguments import ModelArguments, PreferenceDataArguments, RewardArguments
from hfvlm.training.recipe_models import load_model
from hfvlm.training.recipes import finish
from hfvlm.training.rewards import RewardFunction, RewardTrainer, load_reward, reward_class

# No text contains it.
NO_PLACEHOLDER = "\0"


def train_reward(
    model_arguments: ModelArguments, data: PreferenceDataArguments, arguments: TrainingArguments
) -> dict[str, float]:
    """Train a reward on pairs of answers, with a `RewardTrainer`; it begins as a chat model.

    Raises:
        ValueError: hfvlm has no model of this architecture that scores texts, or `trained_parts` leave out its score.
    """
    if "score" not in (parts := model_arguments.trained_parts or ["score"]):
        raise ValueError(f"trained_parts must name the score, too, which begins at random: {[*parts, 'score']}.")
    processor = processor_of(model_arguments.model)
    arguments.remove_unused_columns = False
    kind = reward_class(model_arguments.model)
    trainer = RewardTrainer(
        load_model(model_arguments, arguments.seed, kind, num_labels=1),
        arguments,
        PreferenceCollator(processor),
        train_dataset=read_examples(data.data, data.pictures),
        eval_dataset=read_examples(data.eval_data, data.pictures) if data.eval_data else None,
        processing_class=processor,
    )
    return finish(trainer, arguments, model_arguments)


def train_preferences(
    model_arguments: ModelArguments, data: PreferenceDataArguments, arguments: Any
) -> dict[str, float]:
    """Train on pairs of answers by DPO (https://arxiv.org/abs/2305.18290), with TRL's DPOTrainer.

    The model as it was, which it is compared with, is the model without its adapters, or a second one without any.

    Raises:
        ValueError: a field that TRL's trainer does not know is set.
        ImportError: TRL is not installed.
    """
    trl, rows_of = trl_and_rows()
    check_plain(model_arguments)
    arguments.remove_unused_columns = False
    processor = processor_of(model_arguments.model)
    model, adapted = load_model(model_arguments, arguments.seed), model_arguments.lora_recipe is not None
    trainer = trl.DPOTrainer(
        model,
        None if adapted else load_model(model_arguments, arguments.seed),
        arguments,
        data_collator=PreferenceCollator(processor),
        train_dataset=rows_of(read_examples(data.data, data.pictures)),
        eval_dataset=rows_of(read_examples(data.eval_data, data.pictures)) if data.eval_data else None,
        processing_class=processor,
    )
    return finish(trainer, arguments)


def train_rloo(model_arguments: ModelArguments, data: RewardArguments, arguments: Any) -> dict[str, float]:
    """Train a model by the reward of its own answers with TRL's RLOOTrainer (https://arxiv.org/abs/2402.14740).

    An answer's reward counts relative to those of the other answers to its prompt, less `beta` times the divergence
    from the model as it was: that without its adapters, or the one in `model`'s folder.

    Raises:
        ValueError: the reward has no trained score, or a field that TRL's trainer does not know is set, or the
            model as it was would be another than that in the folder.
        ImportError: TRL is not installed.
    """
    trl, rows_of = trl_and_rows()
    check_plain(model_arguments)
    folder, adapted = model_arguments.model, model_arguments.lora_recipe is not None
    if arguments.beta and not adapted and adapter_settings(folder) is not None:
        raise ValueError(
            f"{folder}: is an adapter, and TRL would take its base for the model as it was: merge them first, "
            f"hfvlm merge {folder} -o OUTPUT."
        )
    processor = processor_of(folder)
    arguments.chat_template_kwargs = RENDERED | (arguments.chat_template_kwargs or {})
    reward = load_reward(data.reward_model).to(arguments.device)
    trainer = trl.RLOOTrainer(
        load_model(model_arguments, arguments.seed),
        RewardFunction(reward, processor_of(data.reward_model), data.reward_batch_size),
        arguments,
        train_dataset=rows_of([prompt_row(row) for row in read_examples(data.data, data.pictures)]),
        processing_class=processor,
    )
    return finish(trainer, arguments)


# Of TRL's `chat_template_kwargs`: it takes the ids of each prompt for the prompt, padding included.
RENDERED = {"padding": False, "return_tensors": None}


def prompt_row(example: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a prompt with images into a row for TRL, whose messages have a part for each image and each text."""
    messages = turns_of("user", example["prompt"])
    messages, images = read_example(dict(example) | {"messages": messages}, NO_PLACEHOLDER)
    for message in messages:
        if isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
    return {"prompt": messages, "images": images}


def trl_and_rows() -> tuple[Any, Callable[[list[dict[str, Any]]], Any]]:
    """Return TRL, and the function that makes a data set for it.

    Raises:
        ImportError: TRL is not installed.
    """
    trl = import_extra("trl", "trl", "Alignment by preferences and by rewards")
    from datasets import Dataset

    return trl, Dataset.from_list


def check_plain(arguments: ModelArguments) -> None:
    """Refuse the fields that only trainers of hfvlm know.

    Raises:
        ValueError: one is set.
    """
    if arguments.layer_decay or arguments.whole_rate != 1:
        raise ValueError("layer_decay and whole_rate: TRL's trainers have one learning rate for all weights.")


def find_task(name: str) -> tuple[tuple[Any, ...], Callable[..., dict[str, float]]]:
    """Return the dataclasses that share a task's fields among them, and the function that trains.

    Raises:
        ImportError: TRL is not installed, and the task needs it.
    """
    if name == "reward":
        return (ModelArguments, PreferenceDataArguments, TrainingArguments), train_reward
    trl, _ = trl_and_rows()
    if name == "preferences":
        return (ModelArguments, PreferenceDataArguments, trl.DPOConfig), train_preferences
    return (ModelArguments, RewardArguments, trl.RLOOConfig), train_rloo
