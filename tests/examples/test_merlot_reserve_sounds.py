"""The example of a small model that finds masked audio; its whole run takes minutes."""

import importlib.util
import json

import pytest
from transformers import AutoModel, AutoProcessor

from tests.support.paths import EXAMPLES


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("merlot_reserve_sounds", EXAMPLES / "merlot_reserve_sounds.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_the_example_runs(example, tmp_path):
    found = example.main(["--output", str(tmp_path), "--steps", "1", "--batch", "2", "--videos", "2"])
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert set(found) == {"with frames", "blind"}
    assert AutoModel.from_pretrained(tmp_path / "blind").config.model_type == "hfvlm_merlot_reserve"
    assert AutoProcessor.from_pretrained(tmp_path / "with-frames").num_audio_tokens == 2
