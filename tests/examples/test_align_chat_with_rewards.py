"""The example of a small LLaVA that unlearns to make up objects; its whole run takes minutes."""

import importlib.util
import json

import numpy as np
import pytest

from hfvlm.samples import scenes
from tests.support.paths import EXAMPLES

EXAMPLE = EXAMPLES / "align_chat_with_rewards.py"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("sentencepiece", reason="comes with hfvlm[convert]")
    pytest.importorskip("trl", reason="comes with hfvlm[trl]")
    spec = importlib.util.spec_from_file_location("align_chat_with_rewards", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_captions_name_what_an_image_shows():
    random = np.random.RandomState(0)
    scene = scenes.ObjectScene((("white", "square"), ("red", "cross")), ("southeast", "northwest"))
    assert scene.caption() == "a red cross and a white square"
    assert scene.caption([("blue", "circle")]) == "a red cross, a white square and a blue circle"
    assert scene.caption(left_out=[("red", "cross")]) == "a white square"
    assert scenes.named_objects(scene.caption()) == [("red", "cross"), ("white", "square")]
    assert scenes.named_objects("red, a circle, infrared square and the red red cross") == [("red", "cross")]
    pixels = np.asarray(scene.render(random)).astype(int)
    (x, y), (left, top) = scenes.PLACES["southeast"], scenes.PLACES["northwest"]
    assert pixels[round(y * 32), round(x * 32)].min() > 200
    red, green, _ = pixels[round(top * 32), round(left * 32)]
    assert red - green > 100


def test_pairs_are_about_one_difference(example):
    random = np.random.RandomState(0)
    for _ in range(30):
        scene = example.compose(random, set(), tested=False)
        truth = set(scene.objects)
        assert set(scenes.named_objects(scene.caption())) == truth
        more, other = (set(scenes.named_objects(make(scene, random))) for make in (example.added, example.exchanged))
        assert (len(more - truth), len(truth - more)) == (1, 0)
        assert (len(other - truth), len(truth - other)) == (1, 1)
        if len(truth) > 1:
            fewer = set(scenes.named_objects(example.left_out(scene, random)))
            assert (len(fewer - truth), len(truth - fewer)) == (0, 1)


@pytest.mark.integration
def test_the_example_runs(example, tmp_path):
    few = ["--steps", "2", "2", "2", "2", "--scenes", "40", "40", "16", "--tests", "6"]
    found = example.main(["--output", str(tmp_path), *few])
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert set(found) == {"instructed", "dpo", "rloo", "reward"}


@pytest.mark.integration
@pytest.mark.parametrize("seed", [0, 1])
def test_fewer_objects_are_made_up_and_no_fewer_are_found(example, tmp_path, seed):
    found = example.main(["--output", str(tmp_path), "--seed", str(seed)])
    before, after = found["instructed"], found["rloo"]
    assert after["chair_s"] < before["chair_s"] / 2
    assert after["chair_i"] < before["chair_i"] / 2
    assert after["recall"] > before["recall"] - 0.02
    assert all(share > 0.8 for share in found["reward"].values())
