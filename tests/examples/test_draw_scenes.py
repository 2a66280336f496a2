"""The example of a small model that learns to draw; its whole run takes minutes."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModel

from tests.support.paths import EXAMPLES

EXAMPLE = EXAMPLES / "draw_scenes.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("draw_scenes", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_the_example_runs(example, tmp_path):
    sizes = ["--codec-steps", "1", "--steps", "1", "--pictures", "1", "--drawings", "1"]
    found = example.main(["--output", str(tmp_path), *sizes])
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert {f"both, {name}" for name in ("seen", "held out", "without the text", "rendered")} < set(found)
    assert AutoModel.from_pretrained(tmp_path).config.model_type == "hfvlm_dalle_mini"


def test_a_small_model_learns_which_codes_a_text_asks_for(example, tmp_path, monkeypatch):
    """The example's training, with a VQGAN that learned nothing, on one image of each of two kinds: each text draws
    its own image, which the empty text does not."""
    torch.manual_seed(0)
    model, processor = example.new_model(tmp_path)
    red, blue = (
        kind
        for kind in example.scenes.all_scenes()
        if (kind.shape, kind.size) == ("cross", "large") and kind.colour in ("red", "blue")
    )
    random = example.np.random.RandomState(0)
    pixels = example.rendered([red, blue], random)
    model.codec.codes.weight.data = model.codec.encode(pixels).latents.permute(0, 2, 3, 1).flatten(0, 2).repeat(4, 1)
    codes = model.codec.encode(pixels).codes.flatten(1)
    monkeypatch.setattr(example, "BATCH", 8)
    example.fit(model, processor, [red, blue], pixels, 200)
    inputs = processor(text=[red.caption(), blue.caption()])
    found = model.generate(**inputs, do_sample=False)[:, 1:]
    assert (found == codes).float().mean() > 0.9
    assert (found == codes.flip(0)).float().mean() < 0.5
