"""Authors' checkpoints to transformers folders."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from hfvlm.checkpoints import CheckpointError
from hfvlm.checkpoints.conversion import Source
from hfvlm.checkpoints.saving import count_nonfinite, save_tensors
from hfvlm.checks.messages import listed, shown
from hfvlm.presets.cards import write_card
from hfvlm.release.fingerprints import RECORD, file_digests, sealed, settings_of, tensor_digest
from hfvlm.release.plans import Plan, Translation, translate
from hfvlm.release.sentence_files import write_sentence_files
from hfvlm.release.sources import beside, read_sources
from hfvlm.versions import __version__
from hfvlm.writing import new_folder

logger = logging.get_logger(__name__)

NO_VOCABULARY = "none"
DTYPES = ("float32", "float16", "bfloat16", "float64")


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
    """Convert an authors' checkpoint to a folder that `from_pretrained` loads.

    Args:
        source: the released file, or the folder that holds it.
        preset: a preset's name (`hfvlm.list_presets()`); or an architecture's, for a checkpoint without preset, whose
            own configuration then lies beside the weights or is given as `original`.
        output: the new folder; it is written beside and moved into place.
        parts: the other files or folders that the model is made of, by their names in the architecture: "base", the
            language model that an adapter, a projector or a delta was trained on, and "vision", its vision tower.
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
        FileNotFoundError: a file is missing; the message names it, and where to get it.
        FileExistsError: there is an output already.
    """
    source = Path(source)
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {shown(dtype)}.")
    with new_folder(output, overwrite=overwrite) as folder:
        sources = read_sources(source, preset, parts or {})
        found = translate(source, preset, sources, original or {})
        digests, nonfinite = write_model(folder, found, dtype)
        check_finite(sources["main"].path, nonfinite, dtype, allowed=allow_nonfinite)
        write_processor(folder, [source, *map(Path, (parts or {}).values())], found.plan, vocabulary)
        write_sentence_files(folder, found.model)
        write_record(folder, source, found.plan, sources, digests, nonfinite)
        write_card(folder, found.plan.preset, name=Path(output).name)
    return Path(output)


def write_model(folder: Path, found: Translation, dtype: str | None = None) -> tuple[dict[str, str], dict[str, int]]:
    """Write safetensors, in shards of 5 GB at most, and config.json.

    A tensor is made, cast and made contiguous as it is written, so that one alone is in memory besides what was read.

    Returns:
        Each tensor's digest, and how many of its numbers are NaN or infinite.
    """
    shapes = written_types(found.shapes, found.model, dtype)
    digests: dict[str, str] = {}
    nonfinite: dict[str, int] = {}

    def visit(name: str, tensor: Tensor) -> None:
        digests[name] = tensor_digest(tensor)
        if count := count_nonfinite(tensor):
            nonfinite[name] = count

    plan = split_torch_state_dict_into_shards(shapes, filename_pattern="model{suffix}.safetensors")
    for name, keys in plan.filename_to_tensors.items():
        save_tensors(folder / name, {key: shapes[key] for key in keys}, found.tensors, visit)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    found.model.config.architectures = [type(found.model).__name__]
    found.model.config.save_pretrained(folder)
    return digests, nonfinite


def written_types(shapes: Mapping[str, Tensor], model: PreTrainedModel, dtype: str | None) -> dict[str, Tensor]:
    """Return meta tensors of the types that are written: floating-point tensors as `dtype`, but for those that the
    model has in float32.

    Sets the model's configured dtype: without `dtype`, the widest that occurs, which loses nothing.
    """
    widths = [tensor.dtype for tensor in shapes.values() if tensor.is_floating_point()]
    target = getattr(torch, dtype) if dtype else max(widths, key=lambda d: (d.itemsize, d != torch.bfloat16))
    model.config.dtype = target
    if dtype is None:
        return dict(shapes)
    exact = set(model._keep_in_fp32_modules_strict or ())
    return {
        key: tensor.to(target) if tensor.is_floating_point() and not exact & set(key.split(".")) else tensor
        for key, tensor in shapes.items()
    }


def check_finite(source: Path, nonfinite: Mapping[str, int], dtype: str | None, *, allowed: bool) -> None:
    """Refuse weights that are NaN or infinite, or warn of them if they are allowed."""
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
    """Write the processor's files; without a vocabulary, the image processor's alone, if it has one."""
    kinds = plan.conversion.vocabularies_for(plan.config)
    if vocabulary == NO_VOCABULARY or not kinds:
        part = plan.conversion.image_processor_for(plan.config, plan.settings)
        if part is not None:
            part.save_pretrained(folder)
        return
    wanted = plan.preset.source.get("vocabulary", {})
    places, paths = [*([Path(vocabulary)] if vocabulary else ()), *sources], []
    for i, names in enumerate(kinds):
        near = (beside(place, names) for place in places)
        path = Path(vocabulary) if vocabulary and i == 0 else next((found for found in near if found), None)
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
    """Write conversion.json: what was made from what, the settings, and the hashes of all tensors and files."""
    main = sources["main"].path
    digest, published = sha256_of(main), plan.preset.published_sha256(main.name)
    if published and not digest.startswith(published):
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
    """Return the hash of the weights file; of an index, where a folder holds shards."""
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
