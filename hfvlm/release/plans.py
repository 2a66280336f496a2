"""How a checkpoint is read: all that is decided by names, shapes and settings, before a number is touched."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hfvlm.checkpoints import CheckpointError, without_prefix
from hfvlm.checkpoints.conversion import Conversion, Source
from hfvlm.checkpoints.key_table import KeyTableError, convert_tables, converted, fit
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.checkpoints.saving import LazyTensors
from hfvlm.checks.messages import shown
from hfvlm.configuration import ConfigurationError, HfvlmConfig
from hfvlm.presets import Preset, list_presets, load_preset
from hfvlm.presets.licences import UNKNOWN
from hfvlm.registry import architectures
from hfvlm.release.sources import ORIGINAL_CONFIGS, conversion_of, json_beside, released_layout, without_numbers

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is made of which files.

    Args:
        preset: the released checkpoint.
        conversion: its architecture's.
        config: of the model.
        layout: of the released file.
        settings: of the processor.
    """

    preset: Preset
    conversion: Conversion
    config: PreTrainedConfig
    layout: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Translation:
    """A checkpoint under the model's names.

    Args:
        plan: how it is read.
        model: the model without memory for its weights.
        shapes: meta tensors of what is written.
        tensors: the numbers, each read and rearranged when it is taken.
    """

    plan: Plan
    model: PreTrainedModel
    shapes: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]


def translate(source: Path, name: str, sources: Mapping[str, Source], original: Mapping[str, Any]) -> Translation:
    """Plan a conversion and account for every key.

    Where the names do not fit and all begin alike, as Lightning's with `model.`, they are tried without it.

    Args:
        source: the released file or folder.
        name: of a preset or an architecture.
        sources: the files by their role.
        original: the checkpoint's own configuration, if it is not beside the file.
    """
    try:
        return _translated(source, name, sources, original)
    except (CheckpointError, KeyTableError):
        main = sources["main"]
        prefix = next(iter(main.tensors), "").partition(".")[0] + "."
        bare = without_prefix(main.tensors, prefix)
        if bare is None:
            raise
        with contextlib.suppress(CheckpointError, KeyTableError):
            return translate(source, name, {**sources, "main": replace(main, tensors=bare)}, original)
        raise


def _translated(source: Path, name: str, sources: Mapping[str, Source], original: Mapping[str, Any]) -> Translation:
    shapes = without_numbers(sources)
    plan = make_plan(source, name, shapes, original)
    model = empty_model(plan.config)
    expected = model.state_dict()
    fresh = fresh_tensors(plan.conversion, plan.config, plan.layout, shapes["main"].tensors, expected)
    filled = {key: tensor for key, tensor in expected.items() if key not in fresh}
    try:
        parts = convert_tables(plan.conversion.tables_for(plan.config, plan.layout, shapes), filled)
    except KeyTableError as error:
        main = sources["main"]
        hint = _native(plan, main) or _likely(main)
        error.context = f"{main.path} is not what {plan.preset.name} ({plan.layout}) expects. {hint} "
        raise
    if fresh:
        logger.warning(f"The file has nothing for {', '.join(fresh)}: initialised, to be trained.")
    written = {key: tensor.to("meta") for part in (*parts, fresh) for key, tensor in part.items()}
    tensors = converted(plan.conversion.tables_for(plan.config, plan.layout, sources), filled)
    return Translation(plan, model, written, tensors | LazyTensors.of(fresh))


def make_plan(source: Path, name: str, sources: Mapping[str, Source], original: Mapping[str, Any]) -> Plan:
    """Plan what the preset defines; or, for an architecture's name, what the checkpoint's own configuration does."""
    if name in architectures():
        return plan_without_preset(source, name, sources, original)
    preset = load_preset(name)
    if "layout" not in preset.source:
        raise ValueError(f"Preset {preset.name} has sizes only; there is no released checkpoint to convert.")
    config = preset.make_config()
    config.licence, config.preset = preset.licence["id"], preset.name
    if isinstance(config, HfvlmConfig):
        config.pass_on_origin()
    return Plan(preset, conversion_of(preset.architecture), config, preset.source["layout"], preset.processor)


def plan_without_preset(source: Path, name: str, sources: Mapping[str, Source], original: Mapping[str, Any]) -> Plan:
    """Plan what the checkpoint's own configuration and the shapes of its tensors define."""
    conversion, main = conversion_of(name), sources["main"]
    original = dict(original or main.settings or json_beside(source, ORIGINAL_CONFIGS))
    where = f"{source}: not a checkpoint of {name}, or its own configuration ({' or '.join(ORIGINAL_CONFIGS)}) is not"
    for role in conversion.parts:
        if role in sources:
            original[f"{role}_config"] = sources[role].settings
    preprocessing = json_beside(source, ("preprocessor_config.json", "processor_config.json"))
    try:
        config = conversion.config_from_original(original, main.tensors)
        settings = conversion.settings_from_original(original, preprocessing)
        layout = released_layout(source, name) or conversion.layout_of(original)
    except (CheckpointError, UnsupportedOriginalError, ConfigurationError):
        raise
    except StrictDataclassError as error:
        raise ConfigurationError(f"{source}: its own configuration: {' '.join(str(error).split())}") from error
    except KeyError as error:
        raise CheckpointError(f"{where} beside it: no {shown(error.args[0])}. {_likely(main)}") from error
    except Exception as error:  # foreign settings and shapes can make no sense in every way
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{where} one: {shown(reason)[1:-1]}. {_likely(main)}") from error
    config.licence = UNKNOWN
    if isinstance(config, HfvlmConfig):
        config.pass_on_origin()
    return Plan(Preset(name=name, architecture=name), conversion, config, layout, settings)


def new_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a configuration, of transformers' own the class that it names."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    return AutoModel.from_config(config) if named is None else named._from_config(config)


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model without memory for its weights."""
    with torch.device("meta"):
        return new_model(config)


def fresh_tensors(
    conversion: Conversion, config: PreTrainedConfig, layout: str, keys: Iterable[str], expected: Iterable[str]
) -> dict[str, Tensor]:
    """Initialise the parameters that an architecture's file need not have, the same way each time."""
    names = conversion.fresh_parameters(config, layout, keys, expected)
    if not names:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        initial = new_model(config).state_dict()
    return {name: initial[name] for name in names}


def _likely(main: Source) -> str:
    """Name the tables that know the keys of a file, for the message about one that does not fit."""
    tables: dict[tuple[str, ...], float] = {}
    for family, configs in _families().items():
        architecture, layout, *_ = family
        for config in configs:
            with contextlib.suppress(KeyError, ValueError):  # keys that this architecture cannot make rows of
                tables[family] = fit(main.tensors, conversion_of(architecture).keys_for(config, layout, main.tensors))
                break
    best = sorted(tables.items(), key=lambda item: -item[1])[:3]
    known = [f"{family[0]} ({family[1]}) knows {score:.0%}" for family, score in best if score > 0.1]
    return f"Of its {len(main.tensors)} keys, {', '.join(known)}." if known else "No architecture knows its keys."


@cache
def _families() -> dict[tuple[str, ...], list[PreTrainedConfig]]:
    """Sort the presets' configurations by architecture, layout and the classes of towers, which decide the keys."""
    families: dict[tuple[str, ...], list[PreTrainedConfig]] = {}
    for name in list_presets():
        preset = load_preset(name)
        if layout := preset.source.get("layout", ""):
            config = preset.make_config()
            towers = [type(getattr(config, part)).__name__ for part in config.sub_configs]
            families.setdefault((preset.architecture, layout, *towers), []).append(config)
    return families


def _native(plan: Plan, main: Source) -> str:
    """Name the remedy for a folder of transformers' own, which a preset for the authors' file does not fit."""
    try:
        layout = plan.conversion.layout_of(main.settings)
    except (KeyError, TypeError, AttributeError, ValueError):
        return ""
    if layout != "transformers" or plan.layout == "transformers":
        return ""
    name = plan.preset.architecture
    return (
        f"It is in transformers' own format ({main.settings.get('model_type')} in config.json), which the "
        f"architecture's name converts: preset={name!r} (--preset {name})."
    )
