"""The model that a recipe trains: its class, its adapters, and which of its parts learn."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig, set_seed

from hfvlm.inference.adapters import adapter_settings, check_whole, config_of, model_class
from hfvlm.inference.adapters import load_model as load_whole
from hfvlm.logs import shows_progress
from hfvlm.registry import architecture_of, find_class
from hfvlm.training.lora import lora
from hfvlm.training.recipe_arguments import ModelArguments

# In a recipe's `trained_parts`: what the model's authors train.
OWN = "own"


def load_model(arguments: ModelArguments, seed: int, kind: Any = None, **options: Any) -> Any:
    """Load a model of the class that its files name, or of another `kind`, whose new parts are initialised, with
    `options` of `from_pretrained`; only what is trained requires gradients.

    Raises:
        ValueError: hfvlm has no such class, the model no such part, weights of the class that the files name are
            missing, or an adapter is to be trained on an adapter.
    """
    set_seed(seed)  # adapters begin at random
    if arguments.lora_recipe is not None and adapter_settings(arguments.model) is not None:
        raise ValueError(
            f"{arguments.model}: is an adapter; another one begins from a whole model: "
            f"hfvlm merge {arguments.model} -o OUTPUT."
        )
    if kind is not None and arguments.model_class is not None:
        raise ValueError(f"model_class: this task trains {kind.__name__}.")
    kind = kind or begun_class(arguments)
    if arguments.modalities:
        options["modalities"] = arguments.modalities
    if arguments.four_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model, problems = load_whole(arguments.model, kind, output_loading_info=True, **options)
    if type(model).__name__ in (config_of(arguments.model).architectures or ()):
        check_whole(arguments.model, model, problems)
    return prepared(model, arguments)


def begun_class(arguments: ModelArguments) -> Any:
    """Return the class that is trained: `model_class`, or the one that the model's files name.

    Raises:
        ValueError: hfvlm has no such class.
    """
    if arguments.model_class is None:
        return model_class(arguments.model)
    if (kind := find_class(arguments.model_class)) is None:
        raise ValueError(f"model_class: {arguments.model_class} is no model of hfvlm.")
    return kind


def class_with_head(folder: str, head: str) -> Any:
    """Return the class with a head of a model's architecture: the one that its files name, or the first.

    Raises:
        ValueError: the architecture has none.
    """
    config = AutoConfig.from_pretrained(folder)
    known = architecture_of(config.model_type).models.get(head, ())
    if not known:
        raise ValueError(f"{folder}: hfvlm's {config.model_type} has no class of {head}.")
    return find_class(next((name for name in config.architectures or () if name in known), known[0]))


def prepared(model: Any, arguments: ModelArguments) -> Any:
    """Freeze what is not trained, and add adapters."""
    if arguments.trained_parts is not None:
        train_parts(model, arguments.trained_parts)
    if arguments.lora_recipe is not None:
        quiet = not shows_progress()
        options: dict[str, Any] = {
            "r": arguments.lora_rank,
            "alpha": arguments.lora_alpha,
            "dropout": arguments.lora_dropout,
        }
        options |= {"layers": arguments.lora_layers, "whole": arguments.lora_whole or ()}
        model = lora(model, arguments.lora_recipe, quiet=quiet, **options)
    return model


def train_parts(model: Any, names: Sequence[str]) -> None:
    """Freeze all but these parts of a model; "own" are those that its authors train.

    Raises:
        ValueError: the model has no such part.
    """
    if list(names) == [OWN] and hasattr(model, "freeze_pretrained"):
        model.freeze_pretrained()
        return
    parts = [name for name, _ in model.named_children()]
    known = [*parts, OWN] if hasattr(model, "freeze_pretrained") else parts
    if unknown := [name for name in names if name not in parts]:
        alone = f" {OWN} stands alone." if OWN in unknown and OWN in known else ""
        has = f"has no {', '.join(unknown)}; it has {', '.join(known)}"
        raise ValueError(f"trained_parts: {type(model).__name__} {has}.{alone}")
    for parameter in model.parameters():
        parameter.requires_grad_(requires_grad=False)
    for name in names:
        getattr(model, name).requires_grad_(requires_grad=True)
    unused = getattr(model, "freeze_unused", None)
    if unused is not None:
        unused()
