"""Write docs/parity.md: what the golden cases and the key lists of released files say of every checkpoint.

HFVLM_GOLDENS=<folder> python -m docs.generators.parity [architecture ...]

With names, their sections alone are written again. Where timm does not load, what was found with it stays.
"""

import datetime
import importlib
import platform
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers

import hfvlm
from hfvlm.checkpoints.key_table import Table, convert_tables
from hfvlm.modeling.timm_trunks import TimmMissingError
from hfvlm.presets import Preset, list_presets, load_preset
from hfvlm.registry import architectures
from hfvlm.release.plans import empty_model
from hfvlm.release.sources import conversion_of
from tests.originals import common
from tests.support.golden import Golden, case_folders, key_lists, notes_of, read_key_list, stem_of
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "parity.md"
NEEDS_TIMM = "needs timm"
HEAD = """# Parity

<!-- written by make parity -->

Every architecture is compared with its authors' own code, which was run on weights that anyone can regenerate; each
released file whose list of keys is at hand is converted at full size, as tensors without memory. This page is written
by `make parity` from the cases under `tests/goldens`, or under `$HFVLM_GOLDENS`.

- **Keys** are the keys of the released file: all of them were accounted for, and filled all of the model's tensors.
  "As" names another file whose list fills the same model from the same layout, where the checkpoint's own list was not
  at hand and its keys are not proven; "no list" means that there was none either, and that its configuration comes
  from the authors' code and documents alone.
- **Error** is the largest difference of any layer or output of any case of the architecture, relative to the largest
  value of that output. The tolerance is 1e-4 (or tighter, as a case defines). Where float32 in the original is itself
  further from float64 than that, three times its distance is allowed.
- **Pixels and ids** are the outputs of processors: ids, prompts and labels are equal; pixels differ by at most the
  error shown, relative to the largest.

"""


@dataclass
class Account:
    """What an architecture's cases gave.

    Args:
        models, processors: the largest relative error of each case.
        outputs: how many were compared.
        noisy: outputs above 1e-4, where float32 itself is that far off in the original.
        refused: cases that hfvlm refuses or lacks, with the reason.
        without_timm: cases that need timm, where it does not load.
        originals: repositories with their commits.
    """

    models: dict[str, float] = field(default_factory=dict)
    processors: dict[str, float] = field(default_factory=dict)
    outputs: int = 0
    noisy: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    without_timm: list[str] = field(default_factory=list)
    originals: set[str] = field(default_factory=set)

    def add(self, golden: Golden) -> None:
        """Run a case, and count what it compared."""
        name, source = golden.folder.name, golden.section("source")
        try:
            importlib.import_module(f"tests.originals.{golden.architecture}").compare(golden)
        except (Exception, pytest.skip.Exception) as error:
            if isinstance(error, pytest.skip.Exception) and "hfvlm[timm]" in str(error):
                self.without_timm.append(name)
            else:
                self.refused[name] = reason_of(error)
            return
        if isinstance(source, dict):
            repository = str(source.get("repository", "")).partition(" (")[0]
            self.originals.add(f"{repository} {str(source.get('commit', ''))[:10]}".strip())
        largest = max(golden.errors.values(), default=0.0)
        (self.processors if name.startswith("processor") else self.models)[name] = largest
        self.outputs += len(golden.compared)
        self.noisy |= {f"{name}: {output}": error for output, error in golden.errors.items() if error > 1e-4}


def reason_of(error: BaseException) -> str:
    """Give the first line of a message, short enough for a table."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].rstrip(".") if len(lines[0]) <= 160 else f"{lines[0][:157]}..."


def cases(name: str) -> Iterator[Golden]:
    for folder in case_folders():
        golden = Golden(folder)
        if golden.architecture == name:
            yield golden


Shapes = dict[str, torch.Size]


def shapes_of(config: Any) -> Shapes:
    return {key: tensor.shape for key, tensor in empty_model(config).state_dict().items()}


@dataclass(frozen=True)
class KeyList:
    """A released file's list of keys, converted without a key left over."""

    name: str
    layout: str
    shapes: Shapes
    keys: int


def converted(path: Path) -> KeyList:
    """Convert a list of keys as the preset says that fits it.

    Raises:
        KeyTableError: a key is left over or a parameter unfilled.
        AssertionError: no preset fits.
    """
    name, original, tensors = path.parent.parent.name, notes_of(path), read_key_list(path)
    conversion, fresh = conversion_of(name), list[str]()
    if compose := getattr(importlib.import_module(f"tests.originals.{name}"), "compose", None):
        tried, attempts = common.tried, []

        def recorded(compose: common.Compose, preset: Preset) -> Any:
            attempts.append(preset)
            return tried(compose, preset)

        with patch.object(common, "tried", recorded):
            config, tables, *rest = compose(path)
        fresh = rest[0] if rest else []
        layout = attempts[-1].source["layout"] if attempts else conversion.layout_of(original)
    else:
        config, layout = conversion.config_from_original(original, tensors), conversion.layout_of(original)
        tables = [Table(tensors, conversion.keys_for(config, layout, tensors))]
        fresh = conversion.fresh_parameters(config, layout, tensors, empty_model(config).state_dict())
    expected = {key: tensor for key, tensor in empty_model(config).state_dict().items() if key not in fresh}
    filled = {key: tensor.shape for part in convert_tables(tables, expected) for key, tensor in part.items()}
    shapes = shapes_of(config)
    assert set(shapes) - set(filled) == set(fresh), sorted(set(shapes) - set(filled))
    return KeyList(stem_of(path), layout, shapes, len(tensors))


@cache
def lists_of(name: str) -> tuple[list[KeyList], dict[str, str]]:
    """Give an architecture's lists, and those that hfvlm refuses with the reason."""
    known, refused = [], {}
    for path in key_lists():
        if path.parent.parent.name == name:
            try:
                known.append(converted(path))
            except Exception as error:
                refused[stem_of(path)] = reason_of(error)
    return known, refused


def keys_of(preset: Preset) -> str:
    """Count a checkpoint's own keys, in all of its files, or name a list that fills the same model from the same
    layout."""
    try:
        shapes, layout = shapes_of(preset.make_config()), preset.source.get("layout")
    except TimmMissingError:
        return NEEDS_TIMM
    equal = [each for each in lists_of(preset.architecture)[0] if (each.layout, each.shapes) == (layout, shapes)]
    files, leaf = preset.source.get("files", []), preset.name.rpartition("/")[2]
    places = {leaf, str(preset.source.get("repository", "")).rpartition("/")[2]}
    names = {Path(file).stem for file in files} | {leaf} | {f"{place}.{file}" for place in places for file in files}
    known = {name.lower() for name in names}
    own = {released_name(each.name): each.keys for each in equal if released_name(each.name) in known}
    if own:
        return f"{sum(own.values())} of {sum(own.values())}"
    return f"as `{equal[0].name}`" if equal else "no list"


def released_name(name: str) -> str:
    """What a file is called in its release: a list's name, without the library before it or the part behind it."""
    name = re.sub(r"^(openclip|bigvision|transformers-[a-z]+)-", "", name)
    return re.sub(r"\.(non_lora_trainables|adapter_model|mm_projector)\.bin$", "", name).lower()


def earlier(name: str) -> str:
    """Return an architecture's section as the page has it; empty where it has none."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    found = re.search(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return "" if found is None else f"{found[0].rstrip()}\n"


def section(name: str) -> str:
    """Write an architecture's section. Where cases need timm, and it does not load, that of the page stays; likewise
    the rows of presets that need it."""
    account, before = Account(), earlier(name)
    for golden in cases(name):
        account.add(golden)
    if account.without_timm and before:
        sys.stderr.write(f"{name} stays as it is: timm does not load, {len(account.without_timm)} cases need it.\n")
        return before
    known = {line.split(" | ")[0]: line for line in before.splitlines() if line.startswith("| ")}
    presets = [load_preset(each) for each in list_presets(name)]
    presets = [each for each in presets if not each.name.endswith("/tiny")]
    error = number(max(account.models.values(), default=0.0)) if account.models else "none"
    processed = f"equal, {number(max(account.processors.values()))}" if account.processors else "none"
    lines = [
        f"## {name}",
        "",
        f"{len(account.models)} model cases and {len(account.processors)} processor cases, {account.outputs} outputs, "
        f"from {' and '.join(sorted(account.originals))}. Largest error {error}.",
        "",
        "| checkpoint | keys | error | pixels and ids | what it is, what deviates, what is assumed |",
        "|---|---|---|---|---|",
    ]
    for preset in presets:
        notes = " ".join(preset.notes.split()).replace("|", "\\|")
        first, keys = f"| {preset.name.rpartition('/')[2]}", keys_of(preset)
        row = f"{first} | {keys} | {error} | {processed} | {notes} |"
        lines.append(known.get(first, row) if keys == NEEDS_TIMM else row)
    lines += listed("Outputs for which float32 is too coarse in the original itself:", account.noisy, number)
    lines += listed("Cases at hand that hfvlm refuses or cannot run yet:", account.refused, str)
    lines += listed("Lists of files at hand that hfvlm has no preset for:", lists_of(name)[1], str)
    return "\n".join([*lines, ""])


def listed(heading: str, rows: dict[str, Any], shown: Any) -> list[str]:
    """List names with what they share, a line each."""
    groups: dict[str, list[str]] = {}
    for name, value in sorted(rows.items()):
        groups.setdefault(shown(value), []).append(f"`{name}`")
    return ["", heading, "", *(f"- {value}: {', '.join(names)}" for value, names in groups.items())] if rows else []


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def versions() -> str:
    return (
        f"Written on {datetime.date.today():%Y-%m-%d} with hfvlm {hfvlm.__version__}, transformers "
        f"{transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}, in float32 on "
        "a CPU.\n\n"
    )


def main(chosen: Iterable[str] = ()) -> None:
    """Write the page, or the sections of some architectures in it.

    Raises:
        ValueError: the page has no such section.
    """
    chosen, text = list(chosen), PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if unknown := [name for name in chosen if not earlier(name)]:
        raise ValueError(f"{PAGE} has no section {', '.join(unknown)}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {*architectures(), *(preset.partition("/")[0] for preset in list_presets())}
        if not chosen:
            text = HEAD + versions() + "\n".join(section(name) for name in sorted(names))
        for name in chosen:
            text = text.replace(earlier(name), section(name))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
