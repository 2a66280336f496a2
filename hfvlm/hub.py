"""Model cards, and folders on their way to the Hub."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard

import hfvlm
from hfvlm.adapters import adapter_base, adapter_text, config_of, record_of
from hfvlm.licences import UNKNOWN, check_licence
from hfvlm.presets import Preset, load_preset
from hfvlm.registry import architecture_of

STUB = "hfvlm_stub"
NO_RESULTS = (
    "None were measured with these files. The numbers in the paper are the authors', on their data and prompts."
)


def write_card(
    folder: str | Path,
    preset: Preset | None = None,
    *,
    name: str | None = None,
    base_model: str | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    text: str = "",
) -> Path:
    """README.md with today's metadata and NOTICE, from the architecture's card in `model_cards/`.

    Args:
        folder: with config.json and, from a conversion, conversion.json; or an adapter's.
        preset: what was converted; by default what conversion.json names.
        name: of the model; by default the folder's.
        base_model: on the Hub, what this model was made from; by default where the preset's file is.
        results: measured numbers, each a mapping of task, dataset, metric, value and protocol.
        text: what else there is to say, in Markdown.
    """
    folder = Path(folder)
    config = config_of(folder)
    architecture = architecture_of(config.model_type).name
    record = _read_json(folder / "conversion.json")
    preset = preset or _preset_of(record_of(folder), architecture, config.licence)
    card = ModelCard(files("hfvlm.model_cards").joinpath(f"{architecture}.md").read_text(encoding="utf-8"))
    licence = dict(preset.licence)
    data: Any = card.data
    data.license = licence["id"] if licence["id"] != UNKNOWN else "other"
    data.license_name = licence.get("name", UNKNOWN if licence["id"] == UNKNOWN else None)
    data.license_link = licence.get("link")
    data.library_name = "hfvlm"
    data.base_model = base_model or adapter_base(folder) or preset.source.get("repository")
    data.model_name = name or folder.name
    if results:
        data.eval_results = [_eval_result(result) for result in results]
    card.text = Template(card.text).substitute(
        name=name or folder.name,
        licence=_licence_text(licence),
        source=_source_text(preset, record),
        notes="\n\n".join(part for part in (preset.notes, adapter_text(folder), text) if part),
        results=_results_table(results) if results else NO_RESULTS,
        version=hfvlm.__version__,
    )
    card.save(folder / "README.md")
    if preset.source:
        (folder / "NOTICE").write_text(_notice(preset, record), encoding="utf-8")
    return folder / "README.md"


def push(
    folder: str | Path,
    repo_id: str,
    *,
    accept_licence: bool = False,
    stub: bool = False,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload a folder with its card to the Hub.

    Args:
        folder: as `convert` or `save_pretrained` wrote it.
        repo_id: "user/name"; it is made if there is none.
        accept_licence: you have read the licence of non-commercial, special or unknown weights.
        stub: add a one-file stub and an `auto_map`, so that `trust_remote_code=True` replaces `import hfvlm` where
            hfvlm is installed. The Hub then tags the repository as custom code.
        private: visibility of a new repository.
        token: of the Hub; by default the stored one.

    Returns:
        The commit's address.

    Raises:
        LicenceError: see `accept_licence`.
    """
    folder = Path(folder)
    check_licence(config_of(folder).licence, accepted=accept_licence)
    with tempfile.TemporaryDirectory() as temporary:
        upload = folder
        if stub or not (folder / "README.md").exists():
            upload = Path(temporary) / folder.name
            shutil.copytree(folder, upload)
            if not (upload / "README.md").exists():
                write_card(upload)
            if stub:
                write_stub(upload)
        api = HfApi(token=token)
        api.create_repo(repo_id, exist_ok=True, private=private)
        return api.upload_folder(repo_id=repo_id, folder_path=upload, commit_message=f"hfvlm {hfvlm.__version__}")


def write_stub(folder: str | Path) -> Path:
    """`hfvlm_stub.py` and the `auto_map` entries that point to it."""
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    architecture = architecture_of(config["model_type"])
    names = [config["architectures"][0], architecture.configs[config["model_type"]]]
    autos = {auto: name for auto, models in architecture.models.items() for name in models if name in names}
    config["auto_map"] = {
        "AutoConfig": f"{STUB}.{names[1]}",
        **{auto: f"{STUB}.{name}" for auto, name in autos.items()},
    }
    _write_json(folder / "config.json", config)
    processing = folder / "processor_config.json"
    if processing.exists():
        settings = _read_json(processing)
        names.append(settings["processor_class"])
        settings["auto_map"] = {"AutoProcessor": f"{STUB}.{settings['processor_class']}"}
        for part in (value for value in settings.values() if isinstance(value, dict)):
            if "image_processor_type" in part:
                names.append(part["image_processor_type"])
                part["auto_map"] = {"AutoImageProcessor": f"{STUB}.{part['image_processor_type']}"}
        _write_json(processing, settings)
    stub = folder / f"{STUB}.py"
    listed = ", ".join(sorted(set(names)))
    stub.write_text(
        f'"""The classes of this model are in hfvlm: pip install hfvlm."""\n\nfrom hfvlm import {listed}\n'
    )
    return stub


def _preset_of(record: Mapping[str, Any], architecture: str, licence: str | None) -> Preset:
    name = record.get("preset", "")
    if "/" in name:
        return load_preset(name)
    return Preset(name=architecture, architecture=architecture, licence={"id": licence or UNKNOWN})


def _licence_text(licence: Mapping[str, Any]) -> str:
    if licence["id"] == UNKNOWN:
        return "Not stated with the checkpoint. Ask its authors before you use it for more than a test."
    name = licence.get("name", licence["id"])
    text = f"[{name}]({licence['link']})" if "link" in licence else f"`{name}`"
    return " ".join(part for part in (f"{text}.", licence.get("note", "")) if part)


def _source_text(preset: Preset, record: Mapping[str, Any]) -> str:
    if not record:
        return "Saved with hfvlm; not converted from another format."
    source, url = record["source"], preset.source.get("url")
    origin = f"[{source['name']}]({url})" if url else f"`{source['name']}`"
    return (
        f"Converted (modified) by hfvlm {record['hfvlm']} from {origin}, sha256 `{source['sha256']}`. All "
        f"{record['keys']['read']} tensors of the file are accounted for; `conversion.json` has the record."
    )


def _notice(preset: Preset, record: Mapping[str, Any]) -> str:
    link = preset.licence.get("link", "see the source")
    origin = preset.source.get("url") or preset.source.get("repository") or record.get("source", {}).get("name", "")
    return (
        f"The weights in this folder were converted (modified) by hfvlm {hfvlm.__version__} from {preset.name}:\n"
        f"{origin}\n\nLicence of the weights: {preset.licence.get('name', preset.licence['id'])}\n{link}\n"
        f"{preset.licence.get('note', '')}\n"
    )


def _eval_result(result: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        task_type=result["task"],
        dataset_type=result["dataset"],
        dataset_name=result["dataset"],
        metric_type=result["metric"],
        metric_value=result["value"],
    )


def _results_table(results: Sequence[Mapping[str, Any]]) -> str:
    rows = [f"| {r['dataset']} | {r['metric']} | {r['value']:.4g} | {r['protocol']} |" for r in results]
    return "\n".join(["| data | metric | value | protocol |", "|---|---|---|---|", *rows])


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
