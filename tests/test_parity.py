"""The page of parity: what is counted of a checkpoint, and what stays where timm does not load."""

from types import SimpleNamespace

import pytest

from docs.generators import parity
from hfvlm.presets import load_preset

PAGE = """# Parity

## clip

2 model cases.

| checkpoint | keys | error | pixels and ids | what it is, what deviates, what is assumed |
|---|---|---|---|---|
| large | 7 of 7 | 1e-6 | equal, 0 | Of timm. |

## painter

Old.
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    path = tmp_path / "parity.md"
    path.write_text(PAGE)
    monkeypatch.setattr(parity, "PAGE", path)
    monkeypatch.setattr(parity, "cases", lambda name: [])
    return path


def test_a_section_is_found_as_it_was_written(page):
    assert parity.earlier("clip").endswith("| large | 7 of 7 | 1e-6 | equal, 0 | Of timm. |\n")
    assert parity.earlier("painter") == "## painter\n\nOld.\n"
    assert parity.earlier("flava") == ""
    with pytest.raises(ValueError, match="has no section flava"):
        parity.main(["flava"])


def test_one_section_alone_is_written(page, monkeypatch):
    monkeypatch.setattr(parity, "section", lambda name: f"## {name}\n\nNew.\n")
    parity.main(["painter"])
    assert page.read_text() == PAGE.replace("Old.", "New.")


def test_what_timm_gave_stays_without_it(page, monkeypatch):
    """A section stays where cases need timm; a row, where its preset does."""

    def compare(golden):
        pytest.skip("it is a model of timm: pip install 'hfvlm[timm]'")

    golden = SimpleNamespace(folder=SimpleNamespace(name="timm"), section=lambda _: None, architecture="clip")
    monkeypatch.setattr(parity.importlib, "import_module", lambda _: SimpleNamespace(compare=compare))
    monkeypatch.setattr(parity, "cases", lambda name: [golden])
    assert parity.section("clip") == parity.earlier("clip")
    monkeypatch.setattr(parity, "cases", lambda name: [])
    monkeypatch.setattr(parity, "list_presets", lambda name: ["clip/large", "clip/small"])
    monkeypatch.setattr(parity, "load_preset", lambda name: SimpleNamespace(name=name, notes="New."))
    monkeypatch.setattr(parity, "lists_of", lambda name: ([], {}))
    monkeypatch.setattr(parity, "keys_of", lambda preset: parity.NEEDS_TIMM)
    found = parity.section("clip")
    assert "| large | 7 of 7 | 1e-6 | equal, 0 | Of timm. |" in found
    assert "| small | needs timm | none | none | New. |" in found


def test_the_keys_of_all_files_are_counted(monkeypatch):
    """A list is called as the preset or the repository, then as the file."""
    preset = load_preset("dalle_mini/min-dalle-mini")
    monkeypatch.setattr(parity, "shapes_of", lambda config: {})
    layout = preset.source["layout"]
    lists = {"min-dalle-mini.decoder_mini.pt": 283, "min-dalle-mini.encoder_mini.pt": 186, "another": 5}
    known = [parity.KeyList(name, layout, {}, keys) for name, keys in lists.items()]
    monkeypatch.setattr(parity, "lists_of", lambda name: (known, {}))
    assert parity.keys_of(preset) == "469 of 469"
    monkeypatch.setattr(parity, "lists_of", lambda name: (known[2:], {}))
    assert parity.keys_of(preset) == "as `another`"
    monkeypatch.setattr(parity, "lists_of", lambda name: ([], {}))
    assert parity.keys_of(preset) == "no list"
