"""The example of a model that is trained with images and finds what it never saw together."""

import importlib.util
from importlib.resources import files

import pytest
from transformers import AutoModel, AutoProcessor

from hfvlm.inference.embedder import Embedder
from tests.support.paths import EXAMPLES

EXAMPLE = EXAMPLES / "six_modalities.py"


@pytest.mark.trained
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
    table = example.main(["--output", str(tmp_path), "--preset", preset, "--steps", "90", "--views", "12"])
    chance = 1 / len(example.EVENTS)
    assert all(table[a][b] > 3 * chance for a, b in pairs), table
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    assert AutoModel.from_pretrained(tmp_path).modalities == AutoProcessor.from_pretrained(tmp_path).modalities


def test_the_shipped_checkpoint_hears_depth():
    """It ships with hfvlm, trained by the example; the events here are new to it."""
    spec = importlib.util.spec_from_file_location("six_modalities", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder = files("hfvlm.samples") / "imagebind-tiny"
    model, processor = AutoModel.from_pretrained(folder, dtype="float32"), AutoProcessor.from_pretrained(folder)
    table = example.recall(model, example.prepare(processor, range(1000, 1003)))
    chance = 1 / len(example.EVENTS)
    for a, b in (("audio", "depth"), ("audio", "text"), ("imu", "text"), ("thermal", "audio")):
        assert table[a][b] > 4 * chance, (a, b, table[a][b])
    assert table["image"]["text"] > 10 * chance
    embedder = Embedder.from_pretrained(folder, ["audio", "text"], dtype="float32", device="cpu")
    event = example.perceive(example.EVENTS[0], 5000)
    found = embedder.encode(audio=event["audio"], text=event["text"])
    assert found.similarity("audio", "text").shape == ()
