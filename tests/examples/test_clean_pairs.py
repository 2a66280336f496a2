"""The example that measures the procedures of `hfvlm data`; its whole run takes minutes."""

import importlib.util
import json

import pytest

from tests.support.paths import EXAMPLES


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("clean_pairs", EXAMPLES / "clean_pairs.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def run(example, tmp_path, *arguments):
    return example.main(["--output", str(tmp_path / "out"), *arguments])


def test_the_example_runs_and_writes_a_page(example, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{example.BEGIN}\nold\n{example.END}\nafter\n")
    small = ["--only", "filter", "--rows", "150", "--steps", "1", "--seeds", "1"]
    found = run(example, tmp_path, *small, "--page", str(page))
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert f"| `filter` | 0 | 150 | {found['filter'][0]['written']} |" in text
    assert "filter: " in text
    assert "dropped because" in text


@pytest.mark.integration
@pytest.mark.parametrize("name", ["filter", "dedupe"])
def test_models_learn_more_from_the_output(example, tmp_path, name):
    found = run(example, tmp_path, "--only", name, "--seeds", "1")
    result = found[name][0]
    assert result["output"]["accuracy"] > result["input"]["accuracy"] + 0.05
