"""The example of a small model that is shown what to paint; its whole run takes minutes."""

import importlib.util
import json

import numpy as np
import pytest

from tests.support.paths import EXAMPLES


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("painter_scenes", EXAMPLES / "painter_scenes.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_the_example_runs(example, tmp_path):
    small = ["--steps", "2", "--pictures", "1", "--images", "1"]
    found = example.main(["--output", str(tmp_path), *small])
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert set(found) == {"seen", "held out"}


@pytest.mark.trained
def test_a_pair_is_learned_from(example, tmp_path, monkeypatch):
    """Two tasks, which differ in the pair alone: what is painted is nearer to that of the pair's own."""
    red, blue = (example.painted(colour, shape=False) for colour in ((255, 30, 30), (30, 30, 255)))
    kinds = {"red": red, "blue": blue}
    monkeypatch.setattr(example, "tasks", lambda: (kinds, {"red": red}))
    monkeypatch.setattr(example, "PATCH", 16)
    small = ["--steps", "150", "--pictures", "40", "--images", "8"]
    found = example.main(["--output", str(tmp_path), *small])
    assert found["seen"]["task"] > 0.8


def test_tasks_differ(example):
    known, new = example.tasks()
    assert (len(known), len(new)) == (42, 12)
    image, mask = example.scene(np.random.RandomState(0))
    made = {paint(image, mask).tobytes() for paint in (known | new).values()}
    assert len(made) == 54
