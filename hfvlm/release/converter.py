"""Authors' checkpoints to transformers folders, and back to transformers' own classes where it has them."""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hfvlm.checkpoints import Checkpoint, CheckpointError, read_checkpoint, weights_in, without_prefix
from hfvlm.checkpoints.conversion import Conversion, Source
from hfvlm.checkpoints.key_table import KeyTableError, convert_tables, fit, restore_keys, restored
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.checkpoints.saving import count_nonfinite, save_tensors
from hfvlm.checks.files import read_json
from hfvlm.checks.messages import listed, shown
from hfvlm.configuration import ConfigurationError
from hfvlm.presets import Preset, list_presets, load_preset
from hfvlm.presets.cards import record_of, write_card, write_export_card
from hfvlm.presets.licences import UNKNOWN
from hfvlm.registry import architecture_of, architectures
from hfvlm.release.fingerprints import RECORD, file_digests, sealed, settings_of, tensor_digest
from hfvlm.versions import __version__
from hfvlm.writing import new_folder

logger = logging.get_logger(__name__)

NO_VOCABULARY = "none"
DTYPES = ("float32", "float16", "bfloat16", "float64")
# What authors and libraries call the configuration that lies beside the weights.
ORIGINAL_CONFIGS = ("open_clip_config.json", "config.json")


@dataclass(frozen=True)
class Plan:
    """How a checkpoint is read: all that is decided before a tensor is touched."""

    preset: Preset
    conversion: Conversion
    config: PreTrainedConfig
    layout: str
    settings: Mapping[str, Any]


def convert(  # noqa: PLR0913 (options)
    source: str | Path,
    preset: str,
    output: str | Path,
    *,
    parts: Mapping[str, str | Path] | None = None,
    original: Mapping[str, Any] | None = None,
    vocabulary: str | Path | None = None,
    dtype: str | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
) -> Path:
    """An authors' checkpoint to a folder that `from_pretrained` loads.

    Args:
        source: the released file, or the folder that holds it.
        preset: a preset's name (`hfvlm.list_presets()`); or an architecture's, for a checkpoint without preset, whose
            own configuration then lies beside the weights or is given as `original`.
        output: the new folder; it is written beside and moved into place.
        parts: the other files or folders that the model is made of, by their names in the architecture: "base", the
            language model that an adapter, a projector or a difference was trained on, and "vision", its vision tower.
        original: the checkpoint's own configuration, in its authors' names.
        vocabulary: the tokenizer's original file, where it is not beside the source; "none" leaves the tokenizer out.
        dtype: store floating-point weights as "float32", "float16", "bfloat16" or "float64"; by default as they are.
        allow_nonfinite: write weights that are NaN or infinite, and record which in conversion.json; they are refused
            otherwise.
        overwrite: replace an existing output.

    Returns:
        The folder.

    Raises:
        CheckpointError: the file cannot be read, asks for code to be run, or holds weights that are NaN or infinite.
        KeyTableError: its tensors are not the preset's; the message lists every offender.
        FileNotFoundError: a file is missing; the message says which, and where to get it.
        FileExistsError: there is an output already.
    """
    source = Path(source)
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {shown(dtype)}.")
    with new_folder(output, overwrite=overwrite) as folder:
        sources = read_sources(source, preset, parts or {})
        plan, model, tensors = matched(source, preset, sources, original)
        digests, nonfinite = write_model(folder, tensors, model, dtype)
        check_finite(sources["main"].path, nonfinite, dtype, allowed=allow_nonfinite)
        write_processor(folder, [source, *map(Path, (parts or {}).values())], plan, vocabulary)
        write_record(folder, source, plan, sources, digests, nonfinite)
        write_card(folder, plan.preset, name=Path(output).name)
    return Path(output)


def read_sources(source: Path, name: str, parts: Mapping[str, str | Path]) -> dict[str, Source]:
    """The released file as "main", what else its release holds, and the `parts`.

    Raises:
        FileNotFoundError: there is no such file or folder, or the release has another that is not there.
        ValueError: the architecture has no such part.
    """
    if not source.exists():
        near = difflib.get_close_matches(source.name, names_in(source.parent), n=3)
        raise FileNotFoundError(f"{source}: no such file or folder.{f' Did you mean {listed(near)}?' if near else ''}")
    architecture = name if name in architectures() else load_preset(name).architecture
    conversion = conversion_of(architecture)
    if unknown := sorted(set(parts) - set(conversion.parts)):
        has = "; ".join(f"{part}: {what}" for part, what in conversion.parts.items()) or "it is one file"
        raise ValueError(f"{architecture} has no part {', '.join(unknown)} ({has}).")
    roles = conversion.files.get(released_layout(source, name), {})
    paths = {role: _beside(source, names) for role, names in roles.items()}
    if source.is_file() and not any(source.name in names for names in roles.values()):
        paths["main"] = source
    missing = [" or ".join(roles[role]) for role, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(f"{source}: the release of {name} also has {', '.join(missing)}, which is not there.")
    found = {"main": source} | {role: path for role, path in paths.items() if path} | dict(parts)
    check_foreign(found["main"])
    return {role: read_source(Path(path)) for role, path in found.items()}


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def check_foreign(source: str | Path) -> None:
    """Refuse what hfvlm wrote itself, and say which commands take it."""
    model_type = str(_json_beside(Path(source), ("config.json",)).get("model_type"))
    if any(model_type in architecture.configs for architecture in architectures().values()):
        raise CheckpointError(
            f"{source}: is hfvlm's own already ({model_type} in config.json), there is nothing to convert. "
            "`from_pretrained` loads its folder, `hfvlm verify` checks it, `hfvlm export` makes it transformers' own."
        )


def matched(
    source: Path, name: str, sources: Mapping[str, Source], original: Mapping[str, Any] | None = None
) -> tuple[Plan, PreTrainedModel, dict[str, Tensor]]:
    """How a checkpoint is read, its model without memory, and its tensors under the model's names.

    Where the names do not fit and all begin alike, as Lightning's with `model.`, they are tried without it.
    """
    try:
        return translated(source, name, sources, original)
    except (CheckpointError, KeyTableError):
        main = sources["main"]
        prefix = next(iter(main.tensors), "").partition(".")[0] + "."
        bare = without_prefix(main.tensors, prefix)
        if bare is None:
            raise
        with contextlib.suppress(CheckpointError, KeyTableError):
            return matched(source, name, {**sources, "main": dataclasses.replace(main, tensors=bare)}, original)
        raise


def translated(
    source: Path, name: str, sources: Mapping[str, Source], original: Mapping[str, Any] | None
) -> tuple[Plan, PreTrainedModel, dict[str, Tensor]]:
    plan = make_plan(source, name, sources, original)
    model = empty_model(plan.config)
    return plan, model, translate(plan, sources, model)


def read_source(path: Path) -> Source:
    """A file or folder with the configuration beside it."""
    if path.is_dir():
        path = weights_in(path)
    names = ("adapter_config.json",) if path.name.startswith("adapter_model.") else ORIGINAL_CONFIGS
    return Source(path, read_checkpoint(path).tensors, _json_beside(path, names))


def released_layout(source: Path, name: str) -> str | None:
    """The preset's; for an architecture's name, the one whose files are there. None: it is in the configuration."""
    if name not in architectures():
        return load_preset(name).source.get("layout")
    for layout, roles in conversion_of(name).files.items():
        if source.name in roles["main"] or (source.is_dir() and all(_beside(source, n) for n in roles.values())):
            return layout
    return None


def make_plan(
    source: Path, name: str, sources: Mapping[str, Source], original: Mapping[str, Any] | None = None
) -> Plan:
    """What the preset says; or, for an architecture's name, what the checkpoint's own configuration says."""
    if name not in architectures():
        preset = load_preset(name)
        if "layout" not in preset.source:
            raise ValueError(f"Preset {preset.name} has sizes only; there is no released checkpoint to convert.")
        config = preset.make_config()
        config.licence, config.preset = preset.licence["id"], preset.name
        config.pass_on_origin()
        conversion = conversion_of(preset.architecture)
        return Plan(preset, conversion, config, preset.source["layout"], preset.processor)
    return plan_without_preset(source, name, sources, original)


def plan_without_preset(
    source: Path, name: str, sources: Mapping[str, Source], original: Mapping[str, Any] | None = None
) -> Plan:
    """What the checkpoint's own configuration and the shapes of its tensors say."""
    conversion = conversion_of(name)
    main = sources["main"]
    original = dict(original or main.settings or _json_beside(source, ORIGINAL_CONFIGS))
    where = f"{source}: not a checkpoint of {name}, or its own configuration ({' or '.join(ORIGINAL_CONFIGS)}) is not"
    for role in conversion.parts:
        if role in sources:
            original[f"{role}_config"] = sources[role].settings
    preprocessing = _json_beside(source, ("preprocessor_config.json", "processor_config.json"))
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
    config.pass_on_origin()
    return Plan(Preset(name=name, architecture=name), conversion, config, layout, settings)


def conversion_of(architecture: str) -> Conversion:
    return importlib.import_module(f"hfvlm.conversion.{architecture}").CONVERSION


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return AutoModel.from_config(config)


def translate(plan: Plan, sources: Mapping[str, Source], model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of all sources under the model's names, every key accounted for."""
    expected = model.state_dict()
    fresh = fresh_tensors(plan.conversion, plan.config, plan.layout, sources["main"].tensors, expected)
    try:
        parts = convert_tables(
            plan.conversion.tables_for(plan.config, plan.layout, sources),
            {k: t for k, t in expected.items() if k not in fresh},
        )
    except KeyTableError as error:
        main = sources["main"]
        hint = _native(plan, main) or _likely(main)
        error.context = f"{main.path} is not what {plan.preset.name} ({plan.layout}) expects. {hint} "
        raise
    if fresh:
        logger.warning(f"The file has nothing for {', '.join(fresh)}: begun anew, to be trained.")
    return {key: tensor for part in (*parts, fresh) for key, tensor in part.items()}


def fresh_tensors(
    conversion: Conversion, config: PreTrainedConfig, layout: str, keys: Iterable[str], expected: Iterable[str]
) -> dict[str, Tensor]:
    """Begin the parameters anew that an architecture says a file need not have, the same way each time."""
    names = conversion.fresh_parameters(config, layout, keys, expected)
    if not names:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        begun = AutoModel.from_config(config).state_dict()
    return {name: begun[name] for name in names}


def written_types(tensors: Mapping[str, Tensor], model: PreTrainedModel, dtype: str | None) -> dict[str, Tensor]:
    """The shapes and types that are written, without memory: floating-point tensors as `dtype`, but for those that the
    model keeps in float32.

    Sets the model's configured dtype: without `dtype`, the widest that occurs, which loses nothing.
    """
    widths = [t.dtype for t in tensors.values() if t.is_floating_point()]
    target = getattr(torch, dtype) if dtype else max(widths, key=lambda d: (d.itemsize, d != torch.bfloat16))
    model.config.dtype = target
    exact = model._keep_in_fp32_modules_strict or ()
    kept = {key for key in tensors if any(name in key.split(".") for name in exact)}

    def type_of(key: str) -> torch.dtype:
        changes = dtype is not None and tensors[key].is_floating_point() and key not in kept
        return target if changes else tensors[key].dtype

    return {key: torch.empty(t.shape, dtype=type_of(key), device="meta") for key, t in tensors.items()}


def write_model(
    folder: Path, tensors: Mapping[str, Tensor], model: PreTrainedModel, dtype: str | None = None
) -> tuple[dict[str, str], dict[str, int]]:
    """safetensors, in shards of 5 GB at most, and config.json; each tensor's digest, and how many of its
    numbers are NaN or infinite.

    A tensor is cast and made contiguous as it is written, so that one alone is in memory besides what was read.
    """
    shapes = written_types(tensors, model, dtype)
    digests: dict[str, str] = {}
    nonfinite: dict[str, int] = {}

    def visit(name: str, tensor: Tensor) -> None:
        digests[name] = tensor_digest(tensor)
        if count := count_nonfinite(tensor):
            nonfinite[name] = count

    plan = split_torch_state_dict_into_shards(shapes, filename_pattern="model{suffix}.safetensors")
    for name, keys in plan.filename_to_tensors.items():
        save_tensors(folder / name, {key: shapes[key] for key in keys}, tensors, visit)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return digests, nonfinite


def check_finite(source: Path, nonfinite: Mapping[str, int], dtype: str | None, *, allowed: bool) -> None:
    """Refuse weights that are NaN or infinite, or say so if they are allowed."""
    if not nonfinite:
        return
    names = listed(f"{name} ({count})" for name, count in nonfinite.items())
    cause = f", as {dtype}" if dtype else ""
    text = (
        f"{source}: {sum(nonfinite.values())} numbers in {len(nonfinite)} tensors are NaN or infinite{cause}: {names}."
    )
    if not allowed:
        raise CheckpointError(f"{text} To convert it all the same: allow_nonfinite=True (--allow-nonfinite).")
    logger.warning(text)


def write_processor(folder: Path, sources: Sequence[Path], plan: Plan, vocabulary: str | Path | None) -> None:
    """The processor's files; without a vocabulary, the image processor's alone."""
    kinds = plan.conversion.vocabularies_for(plan.config)
    if vocabulary == NO_VOCABULARY or not kinds:
        plan.conversion.image_processor_for(plan.config, plan.settings).save_pretrained(folder)
        return
    wanted = plan.preset.source.get("vocabulary", {})
    places, paths = [*([Path(vocabulary)] if vocabulary else ()), *sources], []
    for i, names in enumerate(kinds):
        beside = (_beside(place, names) for place in places)
        path = Path(vocabulary) if vocabulary and i == 0 else next((found for found in beside if found), None)
        if path is None or not path.exists():
            url = wanted.get("url" if i == 0 else f"url_{i + 1}")
            raise FileNotFoundError(
                f"{path or sources[0]}: the tokenizer's vocabulary ({' or '.join(names)}) is not there."
                f"{f' It is at {url}.' if url else ''} Put it beside the source, pass its path as `vocabulary`, or "
                "pass 'none' to convert without a tokenizer."
            )
        paths.append(path)
    plan.conversion.processor_for(plan.config, plan.settings, *paths).save_pretrained(folder)


def write_record(
    folder: Path,
    source: Path,
    plan: Plan,
    sources: Mapping[str, Source],
    digests: Mapping[str, str],
    nonfinite: Mapping[str, int],
) -> None:
    """conversion.json: what was made from what, the settings, and the hashes of all tensors and files."""
    main = sources["main"].path
    digest, published = sha256_of(main), plan.preset.source.get("sha256")
    if published and published != digest:
        logger.warning(f"{source}: its sha256 is not the one published for {plan.preset.name}.")
    record = {
        "source": {"name": source.name, "sha256": digest, "published_sha256": published},
        "preset": plan.preset.name,
        "layout": plan.layout,
        "hfvlm": __version__,
        "keys": {"read": sum(len(part.tensors) for part in sources.values()), "written": len(digests)},
    }
    if nonfinite:
        record["nonfinite"] = dict(nonfinite)
    others = {role: part.path for role, part in sources.items() if role != "main"}
    if others:
        record["parts"] = {
            role: {"name": f"{path.parent.name}/{path.name}", "sha256": sha256_of(path)}
            for role, path in others.items()
        }
    record |= {
        "licence": dict(plan.preset.licence),
        "settings": settings_of(folder),
        "files": file_digests(folder),
        "tensors": dict(digests),
    }
    (folder / RECORD).write_text(json.dumps(sealed(record), indent=2) + "\n")


def sha256_of(source: Path) -> str:
    """Of the weights file; of an index, where a folder holds shards."""
    digest = hashlib.sha256()
    with source.open("rb") as file:
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
    conversion = conversion_of(architecture_of(config.model_type).name)
    if (way := conversion.export) is None:
        raise UnsupportedOriginalError(f"{folder}: transformers has no classes of its own for {config.model_type}.")
    with new_folder(output, overwrite=overwrite) as target:
        native = way.config(config)
        rows = conversion.keys_for(config, "transformers")
        own = read_checkpoint(folder).tensors
        shapes = way.tensors(restore_keys({key: tensor.to("meta") for key, tensor in own.items()}, rows), native)
        native.dtype = config.dtype
        about = {"format": "pt", "hfvlm": __version__}
        save_tensors(target / "model.safetensors", dict(shapes), way.tensors(restored(own, rows), native), about=about)
        native.save_pretrained(target)
        write_export_card(target, config, record_of(folder), Path(output).name)
        way.processor(AutoProcessor.from_pretrained(folder)).save_pretrained(target)
    return Path(output)


def _likely(checkpoint: Checkpoint | Source) -> str:
    """Which tables know the keys of a file, for the message about one that does not fit."""
    tables: dict[tuple[str, ...], float] = {}
    for name in list_presets():
        preset = load_preset(name)
        config, layout = preset.make_config(), preset.source.get("layout", "")
        towers = [type(getattr(config, part)).__name__ for part in config.sub_configs]
        family = (preset.architecture, layout, *towers)
        if layout and family not in tables:
            with contextlib.suppress(KeyError, ValueError):  # keys that this architecture cannot make rows of
                rows = conversion_of(preset.architecture).keys_for(config, layout, checkpoint.tensors)
                tables[family] = fit(checkpoint.tensors, rows)
    best = sorted(tables.items(), key=lambda item: -item[1])[:3]
    known = [f"{family[0]} ({family[1]}) knows {score:.0%}" for family, score in best if score > 0.1]
    return (
        f"Of its {len(checkpoint.tensors)} keys, {', '.join(known)}." if known else "No architecture knows its keys."
    )


def _native(plan: Plan, main: Source) -> str:
    """What to do with a folder of transformers' own, which a preset for the authors' file does not fit."""
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


def _beside(source: Path, names: tuple[str, ...]) -> Path | None:
    folder = source if source.is_dir() else source.parent
    return next((folder / name for name in names if (folder / name).exists()), None)


def _json_beside(source: Path, names: tuple[str, ...]) -> dict[str, Any]:
    path = _beside(source, names)
    return {} if path is None else read_json(path, CheckpointError)
