"""Compares a folder with what its conversion recorded in conversion.json."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfvlm.presets import load_preset
from hfvlm.release.fingerprints import (
    RECORD,
    check_whole,
    file_digests,
    flat,
    read_json,
    seal_of,
    settings_of,
    stored_digests,
    weight_files,
)

WEIGHTS_NAME = "the weights are those that were converted"
SETTINGS_NAME = "the settings are those that were converted"
FILES_NAME = "the tokenizer's and other files are those that were converted"
# Not settings of the preset: what a conversion adds.
ADDED = {"architectures", "dtype", "licence", "preset"}
NAMED = 5


@dataclass(frozen=True)
class Check:
    """One fact about a folder.

    Args:
        name: the fact.
        passed: nothing speaks against it.
        detail: what was found.
        error: the largest difference, relative to the largest value.
        checked: False where there was nothing to check it by; `detail` has the reason.
    """

    name: str
    passed: bool
    detail: str
    error: float | None = None
    checked: bool = True

    @property
    def verdict(self) -> str:
        """Say "yes", "NO" or "not checked"."""
        return ("yes" if self.passed else "NO") if self.checked else "not checked"


def unchecked(name: str, reason: str) -> Check:
    return Check(name, passed=True, detail=f"not checked: {reason}", checked=False)


def record_checks(folder: Path) -> list[Check]:
    """Compare the weights, the settings and the other files with the record of the conversion.

    Raises:
        CheckpointError: a file is cut off or damaged, or a shard is not there.
    """
    for path in weight_files(folder):
        check_whole(path)
    files, settings = file_digests(folder), settings_of(folder)
    if not (folder / RECORD).exists():
        reason = f"the folder has no {RECORD}, so nothing records what was converted"
        return [unchecked(name, reason) for name in (WEIGHTS_NAME, SETTINGS_NAME, FILES_NAME)]
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or not ("seal" in record or "preset" in record):
        return [Check(f"{RECORD} is as it was written", passed=False, detail="it is no record of a conversion")]
    if "seal" not in record:
        reason = f"{RECORD} is of an earlier hfvlm and has no hashes; convert again to have them"
        return [unchecked(WEIGHTS_NAME, reason), preset_check(settings, record), unchecked(FILES_NAME, reason)]
    return [
        seal_check(record),
        tensor_check(stored_digests(folder), section(record, "tensors")),
        settings_check(settings, section(record, "settings")),
        files_check(folder, files, section(record, "files")),
    ]


def section(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def seal_check(record: Mapping[str, Any]) -> Check:
    same = record["seal"] == seal_of(record)
    detail = "its hash agrees" if same else "it was changed, so what follows compares with what it records now"
    return Check(f"{RECORD} is as it was written", same, detail)


def tensor_check(stored: Mapping[str, str], written: Mapping[str, str]) -> Check:
    """Compare digests by name; a tensor that holds what was written under another name is named as such."""
    changed = [key for key in written if stored.get(key, written[key]) != written[key]]
    origin = {digest: key for key, digest in written.items()}
    named = [f"{key} (holds {origin[stored[key]]})" if stored[key] in origin else key for key in changed]
    parts = [
        listed(f"differs from the converted weights in {counted(changed, 'tensor')}", named),
        listed("lacks", [key for key in written if key not in stored]),
        listed("also has", [key for key in stored if key not in written]),
    ]
    found = "; ".join(part for part in parts if part)
    return Check(WEIGHTS_NAME, not found, found or f"all {len(written)} tensors have the recorded SHA-256")


def settings_check(settings: Mapping[str, Any], written: Mapping[str, Any]) -> Check:
    parts = []
    for name in sorted({*settings, *written}):
        if name not in written or name not in settings:
            parts.append(f"{name} {'was not there' if name in settings else 'is missing'}")
        elif differences := differing(settings[name], written[name]):
            parts.append(listed(f"{name}:", differences))
    count = sum(len(flat(content)) for content in written.values())
    return Check(SETTINGS_NAME, not parts, "; ".join(parts) or f"all {count} settings have the recorded values")


def differing(now: Any, then: Any, skipped: Iterable[str] = ()) -> list[str]:
    """Return the sentences about the settings whose values are not the ones of then."""
    now, then = without_inherited(flat(now)), without_inherited(flat(then))
    names = [name for name in sorted({*now, *then}) if name.rpartition(".")[2] not in skipped]
    return [
        f"{name} is {shown(now, name)}, was {shown(then, name)}"
        for name in names
        if name not in now or name not in then or now[name] != then[name] or type(now[name]) is not type(then[name])
    ]


def without_inherited(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the dtypes of parts that are the whole's, which saving writes out."""
    whole = (None, settings.get("dtype"))
    return {name: value for name, value in settings.items() if not name.endswith(".dtype") or value not in whole}


def shown(settings: Mapping[str, Any], name: str) -> str:
    text = repr(settings[name]) if name in settings else "absent"
    return text if len(text) <= 60 else f"{text[:57]}..."


def preset_check(settings: Mapping[str, Any], record: Mapping[str, Any]) -> Check:
    """Compare config.json with the preset, for a record that has no settings."""
    name = record.get("preset")
    if not isinstance(name, str) or "/" not in name:
        return unchecked(SETTINGS_NAME, f"{RECORD} has no settings, and names no preset")
    preset = load_preset(name).make_config().to_dict()
    known = {key: value for key, value in settings.get("config.json", {}).items() if key in preset}
    different = differing(preset | known, preset, ADDED)
    detail = listed("config.json:", different) or f"config.json has those of {name}; the processor's were not recorded"
    return Check(SETTINGS_NAME, not different, detail)


def files_check(folder: Path, files: Mapping[str, Any], written: Mapping[str, Any]) -> Check:
    parts = []
    for name in sorted({*files, *written}):
        if name not in written:
            parts += [] if is_stub(folder / name) else [f"{name} was not there"]
        elif name not in files:
            parts.append(f"{name} is missing")
        elif files[name] != written[name]:
            parts.append(f"{name} differs{changed_sections(files[name], written[name])}")
    detail = ", ".join(written) or "there are none"
    return Check(FILES_NAME, not parts, "; ".join(parts) or f"{detail}: the recorded SHA-256")


def changed_sections(now: Any, then: Any) -> str:
    if not isinstance(now, dict) or not isinstance(then, dict):
        return ""
    names = [name for name in sorted({*now, *then}) if now.get(name) != then.get(name)]
    return f" in {', '.join(names[:NAMED])}"


def is_stub(path: Path) -> bool:
    """Tell whether a file is what `hfvlm push --stub` adds."""
    from hfvlm.release.hub import STUB, stub_text

    return path.name == f"{STUB}.py" and path.read_text(encoding="utf-8") == stub_text(path.parent)


def listed(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{title.rstrip(':')}: {', '.join(names[:NAMED])}{more}"


def counted(items: list[str], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"
