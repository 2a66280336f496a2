"""The example of a small PaliGemma that learns to detect; its whole run takes minutes."""

import importlib.util
import json

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText

from tests.support.paths import EXAMPLES

EXAMPLE = EXAMPLES / "paligemma_shapes.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("paligemma_shapes", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_it_learns_to_detect(example, tmp_path):
    """In sixty steps: which pieces boxes are made of."""
    small = ["--width", "32", "--steps", "60", "--images", "40", "--batch", "8", "--tested", "4"]
    found = example.main(["--output", str(tmp_path), *small])
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert found["last loss"] < 0.6 * found["first loss"]
    assert 0 <= found["mean IoU"] <= 1
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).config.model_type == "hfvlm_paligemma"


def test_the_box_is_around_the_shape_that_is_named(example):
    random = np.random.RandomState(0)
    for _ in range(10):
        image, prompt, (left, top, right, bottom) = example.example(random)
        colour = prompt.removeprefix("<image>detect ").partition(" ")[0]
        inside = (np.asarray(image) == example.COLOURS[colour]).all(axis=2)
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == [left, top, right, bottom]
