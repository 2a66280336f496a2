import numpy as np
import pytest
import torch
from PIL import Image

import hfvlm
from hfvlm.models.painter import (
    HfvlmPainterConfig,
    HfvlmPainterImageProcessor,
    HfvlmPainterModel,
    HfvlmPainterProcessor,
)
from tests.models.painter.test_modeling import CONFIG


class Copies(torch.nn.Module):
    """A model that paints what it is given as the target of the query."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, pixel_values, target_values):
        self.seen = len(pixel_values)
        return type("Output", (), {"reconstruction": target_values})


def image_of(seed, size=(16, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


@pytest.fixture(scope="module")
def painter():
    torch.manual_seed(0)
    return hfvlm.Painter(HfvlmPainterModel(HfvlmPainterConfig(**CONFIG)), HfvlmPainterProcessor(
        HfvlmPainterImageProcessor(size=16)
    ))  # fmt: skip


@pytest.fixture
def copier():
    return hfvlm.Painter(Copies(), HfvlmPainterProcessor(HfvlmPainterImageProcessor(size=16)))


def test_each_task_is_read_out_of_what_is_painted(copier):
    query, shown, random = image_of(0), image_of(1), np.random.default_rng(0)
    classes = random.integers(0, 30, (16, 16))
    prompt = copier.prompt(shown, classes, task="semantic", palette=30)
    assert np.array_equal(copier(query, prompt, task="semantic", palette=30), classes)
    depth = random.integers(0, 9000, (16, 16))
    assert np.abs(copier(query, copier.prompt(shown, depth, task="depth"), task="depth") - depth).max() < 41
    masks = np.zeros((1, 16, 16), bool)
    masks[0, 3:9, 4:12] = True
    where = copier.prompt(shown, masks, task="instances")
    found = copier(query, where, task="instances", most=5)
    assert np.array_equal(found.masks[0].numpy(), masks[0])
    what = copier.prompt(shown, np.where(masks[0], 11, 90), task="semantic", palette="coco")
    named = copier.instances([query], where, what)[0]
    assert named.classes[[np.array_equal(mask, masks[0]) for mask in named.masks.numpy()].index(True)] == 11
    assert copier(query, (shown, shown), task="derain").size == (16, 16)
    assert copier(query, copier.prompt(shown, np.full((17, 2), 8), task="keypoints", size=(16, 16)),
                  task="keypoints").points.shape == (17, 3)  # fmt: skip


def test_a_list_is_as_one_by_one(painter):
    queries = [image_of(0), image_of(1, (9, 20)), image_of(2)]
    pairs = [(image_of(3 + i), image_of(6 + i)) for i in range(3)]
    for prompts in (pairs, pairs[0]):
        found = painter(queries, prompts, batch_size=2)
        for i, query in enumerate(queries):
            alone = painter(query, prompts[i] if isinstance(prompts, list) else prompts)
            assert np.abs(np.asarray(found[i]).astype(int) - np.asarray(alone)).max() <= 1
            assert found[i].size == query.size


def test_what_the_prompt_shows_matters(painter):
    query, shown = image_of(0), image_of(1)
    first, second = (painter.paint(query, (shown, image_of(seed))) for seed in (2, 3))
    assert (first - second).abs().max() > 1e-3


def test_batches(copier):
    copier([image_of(0)] * 5, (image_of(1), image_of(2)), batch_size=3)
    assert copier.model.seen == 2


def test_bad_calls_are_refused(painter):
    pair = (image_of(1), image_of(2))
    with pytest.raises(ValueError, match="batch_size"):
        painter(image_of(0), pair, batch_size=0)
    with pytest.raises(ValueError, match="2 images need one prompt, or as many, not 3"):
        painter([image_of(0)] * 2, [pair] * 3)
    with pytest.raises(ValueError, match="task 'pose' is none of"):
        painter(image_of(0), pair, task="pose")
    with pytest.raises(TypeError, match="'palete'.*'palette'"):
        painter(image_of(0), pair, task="semantic", palete=3)
