"""The example of a small LLaVA that answers about what it never saw together; its whole run takes minutes."""

import argparse
import importlib.util
import json

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, set_seed

from hfvlm.samples import scenes
from tests.support.paths import EXAMPLES

EXAMPLE = EXAMPLES / "chat_about_scenes.py"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("sentencepiece", reason="comes with hfvlm[convert]")
    spec = importlib.util.spec_from_file_location("chat_about_scenes", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_runs(example, tmp_path):
    steps = ["--steps", "1", "1", "1", "--scenes", "40", "--tests", "3"]
    found = example.main(["--output", str(tmp_path), *steps])
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert set(found) == {"all weights", "adapters", "a grey image", "the usual answer"}
    assert all(set(row) == {"colour", "count", "position"} for row in found.values())
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "llava").config.model_type == "hfvlm_llava"


def test_answers_about_a_scene_match_its_pixels(example):
    random = np.random.RandomState(0)
    for _ in range(20):
        scene = example.compose([("white", "square"), ("yellow", "square")], random)
        answers = {sort: answer for sort, (_, answer) in scene.questions().items()}
        assert answers["count"] == scenes.NUMBERS[len(scene.places)]
        assert answers.get("position") == (scene.places[0] if len(scene.places) == 1 else None)
        assert scene.caption().startswith(f"{answers['count']} {answers['colour']} square")
        pixels = np.asarray(scene.render(random))
        for place, (x, y) in scenes.PLACES.items():
            assert (pixels[round(y * 32), round(x * 32), 0] > 200) == (place in scene.places), place


@pytest.mark.trained
def test_the_image_decides_the_answer(example, tmp_path):
    """A short training tells colours apart, which nothing but the image tells."""
    set_seed(0)
    random = np.random.RandomState(0)
    train, test = (
        [scenes.SceneGroup(colour, "circle", ("northwest",)) for colour in scenes.COLOURS for _ in range(count)]
        for count in (40, 5)
    )

    def row(scene):
        return example.conversation("<image>\n", [scene.questions()["colour"]], images=[scene.render(random)])

    rows = [row(scene) for scene in train]
    model, processor = example.new_model(rows)
    options = argparse.Namespace(output=tmp_path, seed=0)
    example.fit(model, processor, rows, example.LEARNERS, 80, options)
    model.eval()
    asked, truth = zip(*(scene.questions()["colour"] for scene in test), strict=True)
    said = example.answers(model, processor, [scene.render(random) for scene in test], asked)
    blind = example.answers(model, processor, [example.GREY] * len(test), asked)
    right, luck = (sum(a == b for a, b in zip(given, truth, strict=True)) for given in (said, blind))
    assert right >= 27
    assert luck <= 5, "one answer to one question"
