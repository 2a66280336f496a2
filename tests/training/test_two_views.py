"""Two views of an image, and what they are made by."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from hfvlm.losses import nt_xent_loss
from hfvlm.samples.scenes import Scene
from hfvlm.training.classification import load_classifier
from hfvlm.training.distortion import ColourDistortion, SimCLRAugmentation, turn_hue
from hfvlm.training.moved import moved_since, report, sums_of
from hfvlm.training.two_views import TwoViewCollator, TwoViewModel

RED = Image.new("RGB", (8, 8), (200, 20, 20))


def test_a_third_of_the_circle_makes_red_green():
    red, green, blue = np.asarray(turn_hue(RED, 1 / 3)).reshape(-1, 3)[0].tolist()
    assert green > 190
    assert red < 30
    assert blue < 30
    assert np.abs(np.asarray(turn_hue(RED, 0.0)).astype(int) - np.asarray(RED)).max() <= 2


def test_a_distortion_depends_on_its_random_numbers_alone():
    view = SimCLRAugmentation(16)
    image = Scene("red", "cross", "large").render()
    views = [np.asarray(view(image, np.random.default_rng(seed))) for seed in (1, 1, 2)]
    assert views[0].shape == (16, 16, 3)
    assert np.array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])


def test_no_strength_changes_no_colour():
    plain = ColourDistortion(0.0, grey=0.0)(RED, np.random.default_rng(0))
    assert np.abs(np.asarray(plain).astype(int) - np.asarray(RED)).max() <= 2
    grey = np.asarray(ColourDistortion(0.0, grey=1.0)(RED, np.random.default_rng(0)))
    assert (grey == grey[..., :1]).all()
    with pytest.raises(ValueError, match="strength must be"):
        ColourDistortion(-1)


@pytest.fixture(scope="module")
def tower(clip_folder):
    return load_classifier(str(clip_folder), ["image"])


def test_views_come_in_pairs_and_are_compared_behind_the_head(tower, clip_folder):
    processor = AutoProcessor.from_pretrained(clip_folder)
    collator = TwoViewCollator(processor, "image", SimCLRAugmentation(32))
    kinds = [Scene("red", shape, "large") for shape in ("cross", "circle", "square")]
    rows = [collator.read({"image": kind.render()}, np.random.default_rng(i)) for i, kind in enumerate(kinds)]
    inputs = collator([row | {"replaced": 0} for row in rows])
    assert inputs["pixel_values"].shape == (3, 2, 3, 32, 32)
    still = collator.read({"image": kinds[0].render()}, None)["views"]
    assert np.array_equal(still[0], collator.read({"image": kinds[0].render()}, None)["views"][0])
    assert not np.array_equal(still[0], still[1])
    torch.manual_seed(0)
    model = TwoViewModel(tower, size=8, temperature=0.5)
    output = model(inputs["pixel_values"])
    assert output.embeds.shape == (3, 2, 8)
    expected = nt_xent_loss(*output.embeds.unbind(1), torch.tensor(2.0))
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.head[0].weight.grad.any()
    assert model.model.classifier.weight.grad is None


def test_what_moved_is_written(tmp_path):
    model = torch.nn.ModuleDict({"tower": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 1)})
    before = sums_of(model)
    assert moved_since(before, model) == []
    with torch.no_grad():
        model["head"].bias[0] += 1e-6
        model["tower"].weight.copy_(model["tower"].weight.flip(0) * torch.tensor([[1.0], [1 + 1e-6]]))
    found = report(before, model, tmp_path)
    assert found["moved"] == ["tower.weight", "head.bias"]
    assert found["parts"] == {"tower": [1, 2], "head": [1, 2]}
    assert (tmp_path / "moved.json").is_file()
