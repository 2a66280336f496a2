"""The example of small models that name images in Chinese; its whole run takes minutes."""

import importlib.util
import json

import pytest
from transformers import AutoModel

from tests.support.paths import EXAMPLES

EXAMPLE = EXAMPLES / "wukong_scenes.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("wukong_scenes", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


@pytest.mark.parametrize(("kind", "model_type"), [("wukong", "hfvlm_wukong"), ("clip", "hfvlm_wukong_clip")])
def test_the_example_runs(example, tmp_path, kind, model_type):
    found = example.main(["--output", str(tmp_path), "--kind", kind, "--steps", "1", "--pictures", "1"])
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert set(found) == {"seen", "held out"}
    assert AutoModel.from_pretrained(tmp_path).config.model_type == model_type


def test_captions_are_read_whole(example, tmp_path):
    _, processor = example.new_model("filip", tmp_path / "vocab.txt")
    captions = {
        example.caption(kind, template) for kind in example.scenes.all_scenes() for template in example.TEMPLATES
    }
    assert len(captions) == 48 * len(example.TEMPLATES)
    tokenizer = processor.tokenizer
    for text in captions:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert ids.index(tokenizer.sep_token_id) == len(text) + 1 < example.TEXT_LENGTH
