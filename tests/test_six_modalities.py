"""The example of a model that is trained with pictures and finds what it never saw together."""

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoModel, AutoProcessor

EXAMPLE = Path(__file__).parent.parent / "examples" / "six_modalities.py"


@pytest.mark.slow  # it trains a model
@pytest.mark.parametrize(
    ("preset", "pairs"),
    [
        ("imagebind/tiny", [("audio", "imu"), ("audio", "text"), ("imu", "text")]),
        ("languagebind/tiny", [("audio", "depth"), ("audio", "image"), ("video", "thermal")]),
    ],
)
def test_modalities_that_were_never_paired_find_each_other(tmp_path, preset, pairs):
    spec = importlib.util.spec_from_file_location("six_modalities", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    table = example.main(["--output", str(tmp_path), "--preset", preset, "--steps", "150", "--views", "12"])
    chance = 1 / len(example.EVENTS)
    assert all(table[a][b] > 3 * chance for a, b in pairs), table
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    assert AutoModel.from_pretrained(tmp_path).modalities == AutoProcessor.from_pretrained(tmp_path).modalities
