"""Named LoRA recipes: which towers are adapted, and which parts are trained in full."""

import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.modules.projection import Bridge, Projection
from hfvlm.modules.similarity import LogitScale
from hfvlm.registry import architectures

# Parts that a recipe trains in full, by the class of their modules.
WHOLE_PARTS: dict[str, tuple[type[nn.Module], ...]] = {"projection": (Projection, Bridge), "scale": (LogitScale,)}


def lora(
    model: PreTrainedModel,
    recipe: str | None = None,
    *,
    r: int = 8,
    alpha: int | None = None,
    dropout: float = 0.0,
    layers: Sequence[str] | None = None,
    whole: Sequence[str] = (),
    quiet: bool = False,
    **options: Any,
) -> Any:
    """Wrap a model for LoRA fine-tuning with PEFT, and print the numbers of trainable parameters.

    Args:
        model: of any architecture of hfvlm.
        recipe: parts joined by "+": the towers that are adapted ("vision", "text", "audio", "language", ...), and
            "projection" and "scale" for the projections and the temperature, which are trained in full. By default all
            towers; of a model that answers about images, "language+projection". New heads of a model, such as a
            reward's score, are trained in full with any recipe.
        r: rank of the adapters.
        alpha: numerator of their scale `alpha / r`; by default twice the rank.
        dropout: on the adapters' inputs.
        layers: names of the linear layers; by default the architecture's, and in a tower that is a model of
            transformers, its own queries and values, or where it has none, what mixes channels.
        whole: names of further modules that are trained in full, as "depth_model.projection".
        quiet: print nothing.
        **options: of `peft.LoraConfig`.

    Returns:
        A `peft.PeftModel`; only the recipe's parameters require gradients.

    Raises:
        ValueError: the model has no such part; the message lists those it has. Or a number is out of its range.
        ImportError: PEFT is not installed.
    """
    check_integer("r", r)
    check_number("dropout", dropout, 0, 1)
    if alpha is not None:
        check_number("alpha", alpha, 0, open_low=True)
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: `pip install 'hfvlm[train]'`.") from error
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=target_pattern(model, recipe, layers),
        modules_to_save=whole_names(model, recipe, whole) or None,
        **options,
    )
    tuned = get_peft_model(model, config)
    if not quiet:
        Console(stderr=True).print(trainable_table(tuned))
    return tuned


def towers(model: PreTrainedModel) -> dict[str, str]:
    """Return towers by their short names: {"vision": "vision_model"}; a tower itself is one called "tower". A model
    may name `further_towers`, encoders that are no models of their own."""
    inside = {
        name.removesuffix("_model"): name
        for name, child in model.named_children()
        if isinstance(child, PreTrainedModel) and not isinstance(child, Bridge)
    }
    inside |= {name: name for name in getattr(model, "further_towers", ())}
    return inside or {"tower": ""}


def target_pattern(model: PreTrainedModel, recipe: str | None, layers: Sequence[str] | None = None) -> str:
    """Return the regular expression, over whole names, of the layers that a recipe adapts.

    Raises:
        ValueError: it names no tower, or one that has no such layer.
    """
    known = towers(model)
    chosen = [part for part in _parts(model, recipe) if part in known]
    if not chosen:
        raise ValueError(f"Recipe {recipe!r} adapts no tower; name at least one of {', '.join(known)}.")
    layers = layers or _default_layers(model)
    # An adapter of a layer that no output depends on would never learn.
    unused = "".join(rf"(?!{re.escape(name)}\.)" for name in getattr(model, "unused_modules", ()))
    patterns = {part: re.escape(f"{known[part]}.") if known[part] else "" for part in chosen}
    for part, prefix in patterns.items():
        if not any(re.fullmatch(rf"{prefix}.*\b({'|'.join(layers)})", name) for name, _ in model.named_modules()):
            raise ValueError(f"No layer of the {part} tower is called {', '.join(layers)}: name its `layers`.")
    return rf"{unused}({'|'.join(patterns.values())}).*\b({'|'.join(layers)})"


def named_modules(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Return the names of modules, each of which the model has.

    Raises:
        ValueError: it has no such module.
    """
    known = {name for name, _ in model.named_modules()}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"{type(model).__name__} has no module {', '.join(unknown)}.")
    return list(names)


def whole_names(model: PreTrainedModel, recipe: str | None, further: Sequence[str]) -> list[str]:
    """Return the names of the modules that are trained in full: a recipe's, a model's `heads`, and further ones."""
    names = [*(whole_modules(model, recipe) or ()), *getattr(model, "heads", ()), *named_modules(model, further)]
    return list(dict.fromkeys(names))


def whole_modules(model: PreTrainedModel, recipe: str | None) -> list[str] | None:
    """Return the names of the modules that a recipe trains in full."""
    return [name for part in _parts(model, recipe) for name in _instances(model, part)] or None


def _parts(model: PreTrainedModel, recipe: str | None) -> list[str]:
    known = [*towers(model), *(part for part in WHOLE_PARTS if _instances(model, part))]
    recipe = recipe or getattr(model, "lora_recipe", None)
    parts = recipe.split("+") if recipe else list(towers(model))
    unknown = [part for part in parts if part not in known]
    if unknown:
        name = type(model).__name__
        raise ValueError(f"{name} has no part {', '.join(unknown)}; a recipe joins {', '.join(known)} by '+'.")
    return parts


def _instances(model: PreTrainedModel, part: str) -> list[str]:
    kinds = WHOLE_PARTS.get(part, ())
    unused = tuple(getattr(model, "unused_modules", ()))
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and name not in unused]


def _default_layers(model: PreTrainedModel) -> tuple[str, ...]:
    for architecture in architectures().values():
        if model.config.model_type in architecture.configs:
            others = [name for part in model.modules() for name in getattr(part, "lora_layers", ())]
            return tuple(dict.fromkeys((*architecture.lora, *others)))
    raise ValueError(f"{type(model).__name__} is no model of hfvlm: name its `layers`.")


def trainable_table(model: nn.Module) -> Table:
    """Count trainable and all parameters, a row for each part of the model."""
    table = Table("part", "trainable", "of", "share", box=None, pad_edge=False)
    rows: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = next((p for p in name.split(".") if p.endswith("_model") and p != "base_model"), "other")
        row = rows.setdefault(part, [0, 0])
        row[0] += parameter.numel() * parameter.requires_grad
        row[1] += parameter.numel()
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    for part, (trainable, total) in rows.items():
        table.add_row(part, f"{trainable:,}", f"{total:,}", f"{trainable / max(total, 1):.2%}")
    return table
