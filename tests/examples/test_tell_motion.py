"""The example of a small Video-ChatGPT that tells which way things go; its whole run takes minutes."""

import argparse
import importlib.util
import json
from itertools import pairwise

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, set_seed

from hfvlm.samples import scenes
from tests.support.paths import EXAMPLES

EXAMPLE = EXAMPLES / "tell_motion.py"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("sentencepiece", reason="comes with hfvlm[convert]")
    spec = importlib.util.spec_from_file_location("tell_motion", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_runs(example, tmp_path):
    found = example.main(["--output", str(tmp_path), "--steps", "1", "--films", "8", "--tests", "3"])
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert set(found) == {"films", "one frame of each", "frames in disorder"}
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).config.model_type == "hfvlm_video_chatgpt"


def test_a_way_back_shows_the_same_frames():
    there, back = (scenes.MovingScene("red", "circle", way).render(np.random.RandomState(3)) for way in ("up", "down"))
    assert there.shape == (8, 32, 32, 3)
    assert np.array_equal(there, back[::-1])
    middle = [np.nonzero(frame[..., 0] > 120)[0].mean() for frame in there]
    assert all(a > b + 1 for a, b in pairwise(middle)), "upwards"


@pytest.mark.trained
def test_the_order_of_frames_decides_the_answer(example, tmp_path, monkeypatch):
    """A short training tells left from right; the same videos backwards are answered the other way round."""
    monkeypatch.setattr(example, "FRAMES", 4)
    set_seed(0)
    random = np.random.RandomState(0)
    train, test = (
        [scenes.MovingScene("white", "circle", way) for way in ("left", "right") for _ in range(count)]
        for count in (100, 15)
    )
    model, processor = example.new_model()
    options = argparse.Namespace(output=tmp_path, seed=0, steps=120)
    example.fit(model, processor, [example.example(scene, random) for scene in train], options)
    model.eval()
    videos = [scene.render(random, 4) for scene in test]
    forwards = example.answers(model, processor, videos, test)
    backwards = example.answers(model, processor, [video[::-1].copy() for video in videos], test)
    assert sum(text == scene.direction for text, scene in zip(forwards, test, strict=True)) >= 27
    assert sum(text != scene.direction for text, scene in zip(backwards, test, strict=True)) >= 27
    assert set(backwards) == {"left", "right"}
