"""Which weights may be published, by the licence that came with them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hfvlm.configuration import LicenceError, check_licence, is_open
from hfvlm.presets import Preset, list_presets, load_preset

UNKNOWN = "unknown"
# How far adapters on adapters are followed.
DEPTH = 8
# Of a repository in the cache, files that locate it: of models, and of processors without one.
MODEL = ("config.json",)
PROCESSING = (*MODEL, "processor_config.json", "tokenizer_config.json", "tokenizer.json")


def check_folder(folder: Path, *, accepted: bool) -> None:
    """Check every licence that a folder's files name: configurations, record, preset, card, an adapter's base.

    Raises:
        LicenceError: one is not open, and `accepted` is off.
    """
    for licence, source in () if accepted else licences_in(folder):
        check_licence(licence, accepted=False, source=source)


def check_model(model: Any, *, accepted: bool = False) -> None:
    """Check a loaded model by its configuration, and by the folder that it was loaded from.

    Raises:
        LicenceError: a licence is not open, and neither `accepted` nor the model's `licence_accepted` is on.
    """
    if accepted or getattr(model, "licence_accepted", False):
        return
    for licence, source in licences_of_settings(model.config.to_dict(), "its configuration"):
        check_licence(licence, accepted=False, source=source)
    origin = getattr(model.config, "_name_or_path", None)
    if origin and Path(origin).is_dir():
        check_folder(Path(origin), accepted=False)


def check_origins(origins: Iterable[str | Path]) -> None:
    """Check what a processor or a tokenizer belongs to: the model beside it, wherever it was loaded from or saved.

    A folder names licences as a model's does, and a repository of the Hub by its files in the cache or by the presets
    that were made of it. Where nothing names one, it is one's own: unlike weights, a processor comes with no licence
    but its model's.

    Raises:
        LicenceError: a licence is not open.
    """
    for origin in map(str, origins):
        folder = _folder_of(origin, PROCESSING)
        for licence, source in licences_in(folder) if folder is not None else ():
            check_licence(licence, accepted=False, source=f"{source} of {origin}")
        for name in presets_by_repository().get(origin.casefold(), ()):
            check_licence(licence_of_preset(name), accepted=False, source=f"preset {name}")


def licences_in(folder: Path, depth: int = DEPTH) -> Iterator[tuple[Any, str]]:
    """Yield the licences that a folder's files name, each with what names it."""
    yield from licences_of_settings(_read(folder / "config.json"), "config.json")
    if (folder / "conversion.json").exists():
        yield from _licences_of_record(_read(folder / "conversion.json"))
    if (folder / "adapter_config.json").exists():
        base = _read(folder / "adapter_config.json").get("base_model_name_or_path")
        yield from licences_of_base(base, depth - 1)
    if (licence := _licence_of_card(folder / "README.md")) is not None:
        yield licence, "README.md"


def licences_of_settings(settings: Mapping[str, Any], source: str) -> Iterator[tuple[Any, str]]:
    """Yield what a configuration and its towers' name: licences, and the presets that they were converted from."""
    if settings.get("licence") is not None:
        yield settings["licence"], source
    if settings.get("preset") is not None:
        yield licence_of_preset(settings["preset"]), f"preset {settings['preset']} in {source}"
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from licences_of_settings(value, f"{name} of {source}")


def licences_of_base(base: Any, depth: int = DEPTH) -> Iterator[tuple[Any, str]]:
    """Yield the licences of the model that an adapter belongs to, a folder's or a repository's on the Hub."""
    folder = _folder_of(base)
    found = list(licences_in(folder, depth)) if folder is not None and depth > 0 else []
    yield from found
    if isinstance(base, str):
        presets = presets_by_repository().get(base.casefold(), ())
        found += [(licence_of_preset(name), f"preset {name}") for name in presets]
        yield from found[len(found) - len(presets) :]
    if not found and not _is_own(folder):
        yield UNKNOWN, f"of the adapter's base, {base}"


def licence_of_preset(name: Any) -> str:
    """Return a preset's licence; "unknown" for one that there is not."""
    if not isinstance(name, str) or name not in list_presets():
        return UNKNOWN
    return _licence_id(load_preset(name))


@cache
def presets_by_repository() -> dict[str, list[str]]:
    """Return the names of presets by the repository, in lower case, that holds their files."""
    found: dict[str, list[str]] = {}
    for name in list_presets():
        repository = load_preset(name).source.get("repository")
        if repository:
            found.setdefault(repository.casefold(), []).append(name)
    return found


def _licence_id(preset: Preset) -> str:
    licence = preset.licence.get("id", UNKNOWN)
    return "other" if is_open(licence) and preset.licence.get("non_commercial") else licence


def _licences_of_record(record: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    licence, preset = record.get("licence"), record.get("preset")
    if licence is not None:
        yield licence.get("id") or UNKNOWN if isinstance(licence, Mapping) else licence, "conversion.json"
    if isinstance(preset, str) and "/" not in preset and licence is not None:
        return  # an architecture's name, and the record's licence
    yield licence_of_preset(preset), f"preset {preset} in conversion.json"


def _licence_of_card(path: Path) -> Any:
    """Return the licence in a card's metadata; None where there is none, or no metadata that can be read."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return (metadata_load(path) or {}).get("license") if path.is_file() else None
    except (ValueError, AttributeError, YAMLError):
        return None


def _folder_of(base: Any, names: Iterable[str] = MODEL) -> Path | None:
    """Find the folder of a model: its own, or the one where the Hub's files are cached, one of `names` among them."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not isinstance(base, str) or not base:
        return None
    if Path(base).is_dir():
        return Path(base)
    try:
        cached = [try_to_load_from_cache(base, name) for name in names]
    except HFValidationError:
        return None
    return next((Path(path).parent for path in cached if isinstance(path, str)), None)


def _is_own(folder: Path | None) -> bool:
    """Tell whether a folder holds a model of hfvlm's that names no licence: one's own."""
    return folder is not None and str(_read(folder / "config.json").get("model_type")).startswith("hfvlm_")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise LicenceError(f"{path} is damaged ({error}): it is unknown whose weights these are.") from error
    if not isinstance(content, Mapping):
        raise LicenceError(f"{path} is no mapping: it is unknown whose weights these are.")
    return content
