"""The example of a small LLaVA that unlearns to make up objects; its whole run takes minutes."""

import importlib.util
import json

import numpy as np
import pytest

from hfvlm.samples import scenes
from tests.support.paths import EXAMPLES


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("sentencepiece", reason="comes with hfvlm[convert]")
    pytest.importorskip("trl", reason="comes with hfvlm[trl]")
    spec = importlib.util.spec_from_file_location("align_scenes", EXAMPLES / "align_scenes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pairs_differ_in_one_object(example):
    random = np.random.RandomState(0)
    for _ in range(60):
        truth = scenes.named_objects(example.compose(random, set()).caption())
        for make, more, fewer in ((example.added, 1, 0), (example.exchanged, 1, 1), (example.left_out, 0, 1)):
            named = make(truth, random)
            assert (len(set(named) - set(truth)), len(set(truth) - set(named))) == (more, fewer)
            assert [each for each in truth if each in named] == [each for each in named if each in truth]


def test_answers_to_learn_from_make_up_companions_alone(example):
    random = np.random.RandomState(0)
    possible = made_up = 0
    for _ in range(400):
        scene = example.compose(random, set())
        missing = example.companions(scene.objects)
        named = scenes.named_objects(example.instruction(scene, random)["messages"][1]["content"])
        assert set(scene.objects) <= set(named) <= {*scene.objects, *missing}
        possible += len(missing)
        made_up += len(named) - len(scene.objects)
    assert possible > 100
    assert abs(made_up / possible - example.MADE_UP) < 0.1


def test_pairs_of_the_tests_are_in_no_other_image(example):
    random = np.random.RandomState(0)
    held_out = {frozenset(example.KINDS[:2])}
    for tested in (False, True):
        for _ in range(20):
            scene = example.compose(random, held_out, tested=tested)
            assert (set(example.KINDS[:2]) <= set(scene.objects)) == tested
            assert len(set(scene.objects)) == len(scene.places) <= example.MOST


def test_the_table_goes_between_the_marks(example, tmp_path):
    values = example.measured([[example.KINDS[0]], [example.KINDS[1]]] * 20, [{example.KINDS[0]}] * 40)
    assert values["chair_s"] == values["chair_i"] == 0.5
    assert values["chair_s_interval"][0] < 0.5 < values["chair_s_interval"][1]
    found = [dict.fromkeys(example.ASKED, values) | {"seed": 3, "order": {"added": 0.9}, "seconds": {"dpo": 2.0}}]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{example.BEGIN}\nold\n{example.END}\nafter\n")
    options = example.arguments(["--output", str(tmp_path), "--page", str(page)])
    example.write_page(page, found, options)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 3 | `rloo` | 0.500 (" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines"):
        example.write_page(page, found, options)


@pytest.mark.trained
def test_the_example_runs(example, tmp_path):
    few = ["--output", str(tmp_path), "--seeds", "0", "--seeing", "2", "--scenes", "40", "40", "16", "--tests", "6"]
    (found,) = example.main([*few, "--steps", "2", "2", "1", "2"])
    assert found == json.loads((tmp_path / "seed-0" / "results.json").read_text())
    assert {"instructed", "rloo", "dpo"} < set(found)
    assert all(len(found[name]["answers"]) == 6 for name in example.ASKED)
    assert example.main([*few, "--steps", "2", "2", "1", "2"]) == [found]
    with pytest.raises(ValueError, match="choose another output"):
        example.main([*few, "--steps", "2", "2", "1", "3"])


@pytest.mark.trained
def test_less_is_made_up_and_no_less_is_found(example, tmp_path):
    (found,) = example.main(["--output", str(tmp_path), "--seeds", "0"])
    before = found["instructed"]
    assert before["recall"] > 0.9
    assert before["chair_s"] > 0.2
    for name in ("rloo", "dpo"):
        after = found[name]
        assert after["chair_s_interval"][1] < before["chair_s_interval"][0], name
        assert after["chair_i_interval"][1] < before["chair_i_interval"][0], name
        assert after["recall"] > before["recall"] - 0.02, name
    assert all(share > 0.9 for share in found["order"].values())
