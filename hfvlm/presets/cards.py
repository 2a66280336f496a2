"""Model cards: README.md with the Hub's metadata, and NOTICE."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from transformers import AutoConfig

from hfvlm.presets import Preset, list_presets, load_preset
from hfvlm.presets.licences import UNKNOWN, is_open, licences_of_settings
from hfvlm.registry import architecture_of, find_class
from hfvlm.versions import __version__

NO_RESULTS = (
    "None were measured with these files. The numbers in the paper are the authors', on their data and prompts."
)
# The last line of a card of ours; a card without it is its user's, whose text stays.
OURS = "Card written by hfvlm"
# Texts of the cards that transformers and PEFT write from their templates.
TEMPLATES = ("This is the model card of a 🤗 transformers model", "<!-- Provide a quick summary of what the model is")


def write_card(
    folder: str | Path,
    preset: Preset | None = None,
    *,
    name: str | None = None,
    base_model: str | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    text: str = "",
) -> Path:
    """Write README.md with today's metadata and NOTICE, from the architecture's card in `model_cards/`.

    Args:
        folder: with config.json and, from a conversion, conversion.json; or of adapters, with adapter_config.json.
        preset: what was converted; by default what conversion.json or the configuration names.
        name: of the model; by default the folder's.
        base_model: on the Hub, what this model was made from; by default where the preset's file is.
        results: measured numbers, each a mapping of task, dataset, metric, value and protocol, and name, where one
            metric was measured in several ways.
        text: further text, in Markdown.
    """
    folder = Path(folder)
    name = spelled(name or folder.resolve().name)
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        return write_adapter_card(folder, name)
    config = AutoConfig.from_pretrained(folder)
    record = record_of(folder)
    preset = preset or preset_of(config, record)
    card = template_of(preset.architecture)
    data: Any = card.data
    describe(data, preset, base_model)
    data.model_name = name
    if results:
        data.eval_results = [_eval_result(result) for result in results]
    card.text = Template(card.text).substitute(
        name=name,
        licence=_licence_text(preset.licence),
        source=_source_text(preset, record),
        notes="\n\n".join(part for part in (preset.notes, text) if part),
        results=_results_table(results) if results else NO_RESULTS,
        version=__version__,
    )
    card.save(folder / "README.md")
    if preset.source:
        (folder / "NOTICE").write_text(_notice(preset, record), encoding="utf-8")
    return folder / "README.md"


def write_adapter_card(folder: Path, name: str) -> Path:
    """Write the card of adapters, from what PEFT and their base's folder have."""
    adapter = _read_json(folder / "adapter_config.json")
    base = str(adapter.get("base_model_name_or_path") or "")
    settings = _read_json(Path(base) / "config.json") if base else {}
    found = find_class(str((adapter.get("auto_mapping") or {}).get("base_model_class")))
    if not settings and found is None:
        raise ValueError(
            f"{folder}: its base {base!r} is not at hand, and adapter_config.json names no class of hfvlm."
        )
    config = AutoConfig.from_pretrained(base) if settings else found.config_class()
    preset = preset_of(config, record_of(Path(base)) if settings else {})
    card = ModelCard.load(folder / "README.md") if (folder / "README.md").exists() else ModelCard("---\n---\n")
    complete(card, preset, name, adapter=True, base=base, settings=adapter)
    card.save(folder / "README.md")
    return folder / "README.md"


def write_export_card(
    folder: Path, config: Any, record: Mapping[str, Any], name: str, purpose: str = "for transformers' own classes"
) -> Path:
    """Write the card of a folder of exported weights: whose these are, and under which licence."""
    preset = preset_of(config, record)
    card = ModelCard("---\n---\n")
    data: Any = card.data
    describe(data, preset, None)
    data.library_name, data.pipeline_tag = "transformers", template_of(preset.architecture).data.get("pipeline_tag")
    card.text = (
        f"\n# {spelled(name)}\n\nThe weights {purpose}.\n\n"
        f"## Where the weights come from\n\n{_source_text(preset, record)}\n\n"
        f"## Licence\n\n{_licence_text(preset.licence)}\n\n{OURS} {__version__}.\n"
    )
    card.save(folder / "README.md")
    if preset.source:
        (folder / "NOTICE").write_text(_notice(preset, record), encoding="utf-8")
    return folder / "README.md"


def record_of(folder: Path) -> dict[str, Any]:
    """Read conversion.json; nothing where it is damaged, which is no reason for a training to end unsaved."""
    try:
        record = _read_json(folder / "conversion.json")
    except ValueError:
        return {}
    whole = isinstance(record, dict) and isinstance(record.get("source", {}), dict)
    return record if whole and {"name", "sha256"} <= set(record.get("source", ())) and "keys" in record else {}


def complete_card(path: Path, config: Any, name: str, adapter: Mapping[str, Any] | None = None) -> None:
    """Complete a card that transformers, its Trainer or PEFT has written.

    Where the text is a template's, ours takes its place; what a user or a Trainer wrote stays.

    Args:
        path: of README.md.
        config: the model's, or for adapters, their base's.
        name: of the model, or of its repository.
        adapter: for adapters, PEFT's settings.
    """
    card = ModelCard.load(path, ignore_metadata_errors=True)
    data: Any = card.data
    origin = str(getattr(config, "_name_or_path", "") or "")
    preset = preset_of(config, record_of(Path(origin)) if origin else {})
    tags = list(data.tags or [])
    if adapter is None and any(words in card.text for words in TEMPLATES):
        write_card(path.parent, preset, name=name)
        card = ModelCard.load(path)
        data = card.data
        data.tags = list(dict.fromkeys([*(data.tags or []), *tags]))
    else:
        complete(card, preset, name, adapter=adapter is not None, base=origin, settings=adapter or {})
    card.save(path)


def complete(
    card: ModelCard, preset: Preset, name: str, *, adapter: bool, base: str, settings: Mapping[str, Any]
) -> None:
    """Give a card our metadata, and where its text is a template's or names no licence, ours."""
    data: Any = card.data
    ours: Any = template_of(preset.architecture).data
    tags = {*(data.tags or []), *(ours.tags or []), *(["lora"] if _is_lora(settings) else [])}
    local = {tag for tag in tags if tag.startswith("base_model:") and not is_hub_id(tag.rpartition(":")[2])}
    data.tags = sorted(tags - local - ({"transformers"} if adapter else set()))
    data.pipeline_tag = data.pipeline_tag or ours.pipeline_tag
    describe(data, preset, base if is_hub_id(base) else None)
    data.library_name = "peft" if adapter else "hfvlm"
    if adapter and (not card.text.strip() or any(words in card.text for words in TEMPLATES)):
        card.text = _adapter_text(preset, name, base, settings)
    elif "## Licence" not in card.text:
        card.text = f"{card.text.rstrip()}\n\n## Licence\n\n{_licence_text(preset.licence)}\n"


def template_of(architecture: str) -> ModelCard:
    """Return the architecture's card in `model_cards/`."""
    return ModelCard(files("hfvlm.model_cards").joinpath(f"{architecture}.md").read_text(encoding="utf-8"))


def describe(data: Any, preset: Preset, base_model: str | None) -> None:
    """Set the metadata that name whose weights these are."""
    licence = preset.licence
    data.license = licence["id"] if licence["id"] != UNKNOWN else "other"
    data.license_name = licence.get("name", UNKNOWN if licence["id"] == UNKNOWN else None)
    data.license_link = licence.get("link")
    data.library_name = "hfvlm"
    data.base_model = base_model or preset.source.get("repository")


def rename(card: str, name: str) -> str:
    """Return a card's text with the model under another name; a card that is not ours as it is."""
    heading = next((line for line in card.splitlines() if line.startswith("# ")), "")
    old, name = heading.removeprefix("# "), spelled(name)
    if OURS not in card or not old:
        return card
    card = card.replace(f"{heading}\n", f"# {name}\n", 1).replace(f'"{old}"', f'"{name}"')
    for before, after in (
        (f"\nmodel_name: {old}\n", f"\nmodel_name: {name}\n"),
        (f"\n- name: {old}\n", f"\n- name: {name}\n"),
    ):
        card = card.replace(before, after, 1)
    return card


def spelled(name: str) -> str:
    """Spell a name so that it ends no string of the card's code, and no line."""
    return "".join("-" if sign in "\"'\\`$<>" or not sign.isprintable() else sign for sign in name)


def is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~")) and not Path(name).exists()


def preset_of(config: Any, record: Mapping[str, Any]) -> Preset:
    """Find what weights were converted from, by their record or configuration; with the licence that is the
    stricter."""
    architecture = architecture_of(config.model_type).name
    names = [record.get("preset"), getattr(config, "preset", None)]
    name = next((name for name in names if name in list_presets()), None)
    found = [licence for licence, _ in licences_of_settings(config.to_dict(), "")]
    licence = next((one for one in found if not is_open(one)), found[0] if found else UNKNOWN)
    if name is None:
        return Preset(name=architecture, architecture=architecture, licence={"id": licence})
    preset = replace(load_preset(name), architecture=architecture)
    if is_open(preset.licence["id"]) and not is_open(licence):
        return replace(preset, licence={"id": licence})
    return preset


def _is_lora(settings: Mapping[str, Any]) -> bool:
    return str(settings.get("peft_type", "")).upper().endswith("LORA")


def _adapter_text(preset: Preset, name: str, base: str, settings: Mapping[str, Any]) -> str:
    kind = (settings.get("auto_mapping") or {}).get("base_model_class")
    loader = f"hfvlm.{kind}" if find_class(str(kind)) else "AutoModel"
    imports = "" if loader.startswith("hfvlm") else "\nfrom transformers import AutoModel"
    method = str(settings.get("peft_type") or "PEFT").upper().rpartition(".")[2]
    rank = f" of rank {settings['r']}" if isinstance(settings.get("r"), int) else ""
    origin = preset.source.get("repository") or preset.name
    place = base if is_hub_id(base) else Path(base).name  # no folder of the machine that they were trained on
    soft = "num_virtual_tokens" in settings  # tokens before the inputs, which no weight holds
    merged = "" if soft else "\nmerged = model.merge_and_unload()  # a model without PEFT"
    return f"""
# {name}

Adapters ({method}{rank}) for a model of the architecture {preset.architecture}, {origin}.
They are no model without it.

## Use

```python
import hfvlm  # registers the model with transformers
from peft import PeftModel{imports}

model = {loader}.from_pretrained("{spelled(place)}")  # the base that they were trained on
model = PeftModel.from_pretrained(model, "{name}"){merged}
```

## Licence

That of the base: {_licence_text(preset.licence)}

{OURS} {__version__}.
"""


def _licence_text(licence: Mapping[str, Any]) -> str:
    if licence["id"] == UNKNOWN:
        return "Not stated with the checkpoint. Ask its authors before you use it for more than a test."
    name = licence.get("name", licence["id"])
    text = f"[{name}]({licence['link']})" if "link" in licence else f"`{name}`"
    return " ".join(part for part in (f"{text}.", licence.get("note", "")) if part)


def _source_text(preset: Preset, record: Mapping[str, Any]) -> str:
    url = preset.source.get("url")
    source = record.get("source", {})
    if not source and preset.source:
        origin = f"[{preset.name}]({url})" if url else f"`{preset.name}`"
        return f"Made with hfvlm {__version__} from a conversion of {origin}, and trained or merged since."
    if not source:
        return "Saved with hfvlm; not converted from another format."
    origin = f"[{source['name']}]({url})" if url else f"`{source['name']}`"
    return (
        f"Converted (modified) by hfvlm {record['hfvlm']} from {origin}, sha256 `{source['sha256']}`. All "
        f"{record['keys']['read']} tensors of the file are accounted for; `conversion.json` has the record."
    )


def _notice(preset: Preset, record: Mapping[str, Any]) -> str:
    link = preset.licence.get("link", "see the source")
    origin = preset.source.get("url") or preset.source.get("repository") or record.get("source", {}).get("name", "")
    return (
        f"The weights in this folder were converted (modified) by hfvlm {__version__} from {preset.name}:\n"
        f"{origin}\n\nLicence of the weights: {preset.licence.get('name', preset.licence['id'])}\n{link}\n"
        f"{preset.licence.get('note', '')}\n"
    )


def _eval_result(result: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        task_type=result["task"],
        dataset_type=result["dataset"],
        dataset_name=result["dataset"],
        metric_type=result["metric"],
        metric_name=result.get("name", result["metric"]),
        metric_value=result["value"],
    )


def _results_table(results: Sequence[Mapping[str, Any]]) -> str:
    rows = [f"| {r['dataset']} | {r.get('name', r['metric'])} | {r['value']:.4g} | {r['protocol']} |" for r in results]
    return "\n".join(["| data | metric | value | protocol |", "|---|---|---|---|", *rows])


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
