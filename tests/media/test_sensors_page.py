"""The page on sensors runs as it is written, and prints what it says."""

import re

import pytest

from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "sensors.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_every_block_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    assert len(BLOCKS) >= 7
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), names)
        promised = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
        assert capsys.readouterr().out.splitlines() == promised, block


@pytest.mark.parametrize("modality", ["image", "video", "audio", "depth", "thermal", "imu"])
def test_every_sensor_has_a_row_and_a_reader(modality):
    from hfvlm import media

    text = PAGE.read_text(encoding="utf-8")
    assert f"| {modality} | `read_{modality}` |" in text
    assert hasattr(media, f"read_{modality}")
