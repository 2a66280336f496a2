"""hfvlm computes what the originals compute. A new case folder is a new test; nothing here knows one by name."""

import importlib
from pathlib import Path

import pytest

from hfvlm.registry import architectures
from tests.support.golden import Golden, case_folders, name_of

RUNNERS = {path.stem for path in (Path(__file__).parent / "originals").glob("*.py")} - {"__init__", "common"}


@pytest.mark.parametrize("folder", case_folders(), ids=name_of)
def test_equals_the_original(folder):
    golden = Golden(folder)
    name = golden.architecture
    if name not in architectures() and name not in RUNNERS:
        pytest.skip(f"hfvlm has no architecture called {name!r} yet")
    importlib.import_module(f"tests.originals.{name}").compare(golden)
    assert golden.checked, "the runner does not check a case's options"
    forgotten = sorted(set(golden.outputs) - golden.compared)
    assert not forgotten, f"stored outputs that nothing was compared with: {forgotten}"
