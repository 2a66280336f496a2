"""The example that measures the procedures of `hfvlm data`; its whole run takes minutes."""

import importlib
import json

import pytest

from tests.support.paths import EXAMPLES


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("clean_pairs")


def run(example, tmp_path, *arguments):
    return example.main(["--output", str(tmp_path / "out"), *arguments])


def small(name, rows):
    return ["--only", name, "--rows", str(rows), "--steps", "1", "--seeds", "1"]


def test_the_example_runs_and_writes_a_page(example, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{example.BEGIN}\nold\n{example.END}\nafter\n")
    found = run(example, tmp_path, *small("filter", 150), "--page", str(page))
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert f"| `filter` | 0 | 150 | {found['filter'][0]['written']} |" in text
    assert example.shown(found["filter"][0]["sample"]) in text
    assert "filter: " in text
    assert "dropped because" in text


def test_capfilt_counts_what_is_true(example, tmp_path):
    (result,) = run(example, tmp_path, *small("capfilt", 60))["capfilt"]
    assert result["rows"] == 60
    assert "sample" not in result
    assert all(0 <= share <= 1 for share in result["measures"].values())
    assert 0.2 < result["measures"]["given texts that are true"] < 0.6  # 60 % are of other scenes
    assert "given texts kept" in result["report"]
    assert any("generated texts that are true" in line for line in example.details([result]))
    true_words = example.capfilt.true_words
    assert true_words("a circle, small and red", "a small red circle") == 1
    assert true_words("a circle, small and blue", "a small red circle") == pytest.approx(2 / 3)
    assert true_words("a red circle or square", "a small red circle") == pytest.approx(1 / 3)


@pytest.mark.trained
@pytest.mark.parametrize("name", ["filter", "dedupe", "capfilt"])
def test_models_learn_more_from_the_output(example, tmp_path, name):
    found = run(example, tmp_path, "--only", name, "--seeds", "1")
    result = found[name][0]
    assert result["output"]["accuracy"] > result["input"]["accuracy"] + 0.05
