"""The example of a small model that writes about what it never saw; its whole run takes minutes."""

import importlib.util
import json

from transformers import AutoModel

from hfvlm.samples.scenes import Scene
from tests.support.paths import EXAMPLES

EXAMPLE = EXAMPLES / "caption_scenes.py"


def load():
    spec = importlib.util.spec_from_file_location("caption_scenes", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_the_example_runs(tmp_path):
    found = load().main(["--output", str(tmp_path), "--steps", "2", "--pictures", "1"])
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert set(found) == {"attributes named", "attributes named blindly", "zero-shot accuracy among 48"}
    assert AutoModel.from_pretrained(tmp_path).config.model_type == "hfvlm_coca"


def test_attributes_are_counted():
    kinds = [Scene("red", "circle", "small"), Scene("blue", "cross", "large")]
    example = load()
    assert example.named([kind.caption("a {shape}, {size} and {colour}") for kind in kinds], kinds) == 1
    assert example.named(["a small red square", "red blue cross"], kinds) == 3 / 6
    assert example.named(["", "thing"], kinds) == 0
