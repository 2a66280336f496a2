"""Authors' checkpoints to transformers folders, and back to transformers' own classes where it has them."""

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

import hfvlm
from hfvlm.checkpoints import Checkpoint, CheckpointError, read_checkpoint, weights_in
from hfvlm.hub import write_card
from hfvlm.key_table import KeyTableError, convert_keys, fit, restore_keys
from hfvlm.licences import UNKNOWN
from hfvlm.presets import Preset, list_presets, load_preset
from hfvlm.registry import architectures
from hfvlm.writing import new_folder

logger = logging.get_logger(__name__)

NO_VOCABULARY = "none"
# What authors and libraries call the configuration that lies beside the weights.
ORIGINAL_CONFIGS = ("open_clip_config.json", "config.json")


@dataclass(frozen=True)
class Plan:
    """How a checkpoint is read: all that is decided before a tensor is touched."""

    preset: Preset
    module: ModuleType
    config: PreTrainedConfig
    layout: str
    settings: Mapping[str, Any]


def convert(
    source: str | Path,
    preset: str,
    output: str | Path,
    *,
    original: Mapping[str, Any] | None = None,
    vocabulary: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """An authors' checkpoint to a folder that `from_pretrained` loads.

    Args:
        source: the released file, or the folder that holds it.
        preset: a preset's name (`hfvlm.list_presets()`); or an architecture's, for a checkpoint without preset, whose
            own configuration then lies beside the weights or is given as `original`.
        output: the new folder; it is written beside and moved into place.
        original: the checkpoint's own configuration, in its authors' names.
        vocabulary: the tokenizer's original file, where it is not beside the source; "none" leaves the tokenizer out.
        dtype: store floating-point weights as "float32", "float16" or "bfloat16"; by default as they are.
        overwrite: replace an existing output.

    Returns:
        The folder.

    Raises:
        CheckpointError: the file cannot be read, or asks for code to be run.
        KeyTableError: its tensors are not the preset's; the message lists every offender.
        FileNotFoundError: a file is missing; the message says which, and where to get it.
        FileExistsError: there is an output already.
    """
    source = Path(source)
    with new_folder(output, overwrite=overwrite) as folder:
        checkpoint = read_checkpoint(source)
        plan = make_plan(source, preset, checkpoint, original)
        model = empty_model(plan.config)
        tensors = cast(translate(source, checkpoint, plan, model), model, dtype)
        write_model(folder, tensors, model)
        write_processor(folder, source, plan, vocabulary)
        write_record(folder, source, plan, checkpoint, tensors)
        write_card(folder, plan.preset, name=Path(output).name)
    return Path(output)


def make_plan(source: Path, name: str, checkpoint: Checkpoint, original: Mapping[str, Any] | None = None) -> Plan:
    """What the preset says; or, for an architecture's name, what the checkpoint's own configuration says."""
    if name not in architectures():
        preset = load_preset(name)
        if "layout" not in preset.source:
            raise ValueError(f"Preset {preset.name} has sizes only; there is no released checkpoint to convert.")
        config = preset.make_config()
        config.licence = preset.licence["id"]
        return Plan(preset, conversion_module(preset.architecture), config, preset.source["layout"], preset.processor)
    module = conversion_module(name)
    original = original or _json_beside(source, ORIGINAL_CONFIGS)
    preprocessing = _json_beside(source, ("preprocessor_config.json", "processor_config.json"))
    try:
        config = module.config_from_original(original, checkpoint.tensors)
    except KeyError as error:
        raise CheckpointError(
            f"{source}: not a checkpoint of {name}, or its own configuration ({' or '.join(ORIGINAL_CONFIGS)}) is not "
            f"beside it: no {error.args[0]!r}. {_likely(checkpoint)}"
        ) from error
    config.licence = UNKNOWN
    settings = module.settings_from_original(original, preprocessing)
    return Plan(Preset(name=name, architecture=name), module, config, module.layout_of(original), settings)


def conversion_module(architecture: str) -> ModuleType:
    return importlib.import_module(f"hfvlm.conversion.{architecture}")


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return AutoModel.from_config(config)


def translate(source: Path, checkpoint: Checkpoint, plan: Plan, model: PreTrainedModel) -> dict[str, Tensor]:
    """The checkpoint's tensors under the model's names, every key accounted for."""
    rows = plan.module.keys_for(plan.config, plan.layout, checkpoint.tensors)
    try:
        return convert_keys(checkpoint.tensors, rows, model.state_dict())
    except KeyTableError as error:
        error.context = f"{source} is not what {plan.preset.name} ({plan.layout}) expects. {_likely(checkpoint)} "
        raise


def cast(tensors: dict[str, Tensor], model: PreTrainedModel, dtype: str | None) -> dict[str, Tensor]:
    """Floating-point tensors as `dtype`, but for those that the model keeps in float32.

    Sets the model's configured dtype: without `dtype`, the widest that occurs, which loses nothing.
    """
    widths = [t.dtype for t in tensors.values() if t.is_floating_point()]
    target = getattr(torch, dtype) if dtype else max(widths, key=lambda d: (d.itemsize, d != torch.bfloat16))
    model.config.dtype = target
    if dtype is None:
        return tensors
    exact = model._keep_in_fp32_modules_strict or ()
    kept = {key for key in tensors if any(name in key.split(".") for name in exact)}
    return {k: t.to(target) if t.is_floating_point() and k not in kept else t for k, t in tensors.items()}


def write_model(folder: Path, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    """safetensors, in shards of 5 GB at most, and config.json."""
    plan = split_torch_state_dict_into_shards(dict(tensors), filename_pattern="model{suffix}.safetensors")
    for name, keys in plan.filename_to_tensors.items():
        # A copy, since safetensors takes no views into shared storage; one shard at a time is in memory.
        save_file({key: tensors[key].clone().contiguous() for key in keys}, folder / name, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def write_processor(folder: Path, source: Path, plan: Plan, vocabulary: str | Path | None) -> None:
    """The processor's files; without a vocabulary, the image processor's alone."""
    if vocabulary == NO_VOCABULARY:
        plan.module.image_processor_for(plan.config, plan.settings).save_pretrained(folder)
        return
    path = Path(vocabulary) if vocabulary else _beside(source, plan.module.VOCABULARIES)
    if path is None or not path.exists():
        wanted = plan.preset.source.get("vocabulary", {})
        where = f" It is at {wanted['url']}." if "url" in wanted else ""
        names = " or ".join(plan.module.VOCABULARIES)
        raise FileNotFoundError(
            f"{path or source}: the tokenizer's vocabulary ({names}) is not there.{where} "
            "Put it beside the source, pass its path as `vocabulary`, or pass 'none' to convert without a tokenizer."
        )
    plan.module.processor_for(plan.config, plan.settings, path).save_pretrained(folder)


def write_record(
    folder: Path, source: Path, plan: Plan, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]
) -> None:
    """conversion.json: what was made from what."""
    digest, published = sha256_of(source), plan.preset.source.get("sha256")
    if published and published != digest:
        logger.warning(f"{source}: its sha256 is not the one published for {plan.preset.name}.")
    record = {
        "source": {"name": source.name, "sha256": digest, "published_sha256": published},
        "preset": plan.preset.name,
        "layout": plan.layout,
        "hfvlm": hfvlm.__version__,
        "keys": {"read": len(checkpoint.tensors), "written": len(tensors)},
    }
    (folder / "conversion.json").write_text(json.dumps(record, indent=2) + "\n")


def sha256_of(source: Path) -> str:
    """Of the weights file; of an index, where a folder holds shards."""
    digest = hashlib.sha256()
    with (weights_in(source) if source.is_dir() else source).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def export(folder: str | Path, output: str | Path, *, to: str = "transformers", overwrite: bool = False) -> Path:
    """An hfvlm folder to one that transformers' own classes load, with equal outputs.

    Args:
        folder: as `convert` or `save_pretrained` wrote it.
        output: the new folder; it is written beside and moved into place.
        to: "transformers".
        overwrite: replace an existing output.

    Raises:
        UnsupportedOriginalError: transformers has no such architecture.
        FileExistsError: there is an output already.
    """
    if to != "transformers":
        raise ValueError(f"Folders are exported to 'transformers', not to {to!r}.")
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    module = conversion_module(config.model_type.removeprefix("hfvlm_"))
    with new_folder(output, overwrite=overwrite) as target:
        native = module.config_to_transformers(config)
        rows = module.keys_for(config, "transformers")
        tensors = restore_keys(read_checkpoint(folder).tensors, rows)
        native.dtype = config.dtype
        save_file(
            {k: t.clone().contiguous() for k, t in tensors.items()}, target / "model.safetensors", {"format": "pt"}
        )
        native.save_pretrained(target)
        module.processor_to_transformers(AutoProcessor.from_pretrained(folder)).save_pretrained(target)
    return Path(output)


def _likely(checkpoint: Checkpoint) -> str:
    """Which tables know the keys of a file, for the message about one that does not fit."""
    tables: dict[tuple[str, ...], float] = {}
    for name in list_presets():
        preset = load_preset(name)
        config, layout = preset.make_config(), preset.source.get("layout", "")
        towers = [type(getattr(config, part)).__name__ for part in config.sub_configs]
        family = (preset.architecture, layout, *towers)
        if layout and family not in tables:
            rows = conversion_module(preset.architecture).keys_for(config, layout, checkpoint.tensors)
            tables[family] = fit(checkpoint.tensors, rows)
    best = sorted(tables.items(), key=lambda item: -item[1])[:3]
    known = [f"{family[0]} ({family[1]}) knows {score:.0%}" for family, score in best if score > 0.1]
    return (
        f"Of its {len(checkpoint.tensors)} keys, {', '.join(known)}." if known else "No architecture knows its keys."
    )


def _beside(source: Path, names: tuple[str, ...]) -> Path | None:
    folder = source if source.is_dir() else source.parent
    return next((folder / name for name in names if (folder / name).exists()), None)


def _json_beside(source: Path, names: tuple[str, ...]) -> dict[str, Any]:
    path = _beside(source, names)
    return {} if path is None else json.loads(path.read_text(encoding="utf-8"))
