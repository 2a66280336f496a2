"""Examples of training: augmentation, masks, weights of the loss."""

from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from hfvlm.models.painter import HfvlmPainterImageProcessor
from hfvlm.models.painter.pairs import (
    BLACK,
    Box,
    Draw,
    Jitter,
    PairAugmentation,
    PairMask,
    draw_box,
    filters_of,
    loss_weights,
    normalised,
    recrop,
)

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))


def test_the_same_part_of_both_is_taken():
    augmentation = PairAugmentation(16, jitter=0.0)
    random = np.random.default_rng(0)
    for _ in range(20):
        draw = augmentation.draw(30, 40, random)
        image, target = augmentation.apply(IMAGE, IMAGE, draw, filters=(3, 3))
        assert torch.equal(image, target)


def test_colors_change_of_the_image_alone():
    draw = Draw(Box(0, 0, 30, 40), Jitter((2, 0, 1, 3), 1.3, 0.8, 1.1, 0.1))
    image, target = PairAugmentation(16).apply(IMAGE, IMAGE, draw, filters=(3, 3))
    plain = HfvlmPainterImageProcessor(size=16)(IMAGE, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(target, plain, atol=1e-6)
    assert (image - target).abs().max() > 0.1


def test_mirrored():
    whole = Box(0, 0, 30, 40)
    plain, _ = PairAugmentation(16).apply(IMAGE, IMAGE, Draw(whole), filters=(3, 3))
    mirrored, _ = PairAugmentation(16).apply(IMAGE, IMAGE, Draw(whole, None, flip=True), filters=(3, 3))
    assert torch.equal(mirrored, plain.flip(-1))


def test_a_whole_turn_of_hues_is_none():
    hsv = np.asarray(Jitter((3,), 1, 1, 1, 0.25)(IMAGE).convert("HSV")).astype(int)
    turned = (hsv[..., 0] - np.asarray(IMAGE.convert("HSV")).astype(int)[..., 0]) % 256
    assert np.median(turned) == pytest.approx(63, abs=3)
    assert np.abs(np.asarray(Jitter((3,), 1, 1, 1, 0.0)(IMAGE)).astype(int) - np.asarray(IMAGE)).max() < 8


def test_how_often_and_how_much():
    """Shares of 400 draws, and the ranges of what is drawn."""
    random, augmentation = np.random.default_rng(0), PairAugmentation(16)
    draws = [augmentation.draw(30, 40, random) for _ in range(400)]
    assert np.mean([draw.jitter is not None for draw in draws]) == pytest.approx(0.8, abs=0.07)
    assert np.mean([draw.flip for draw in draws]) == pytest.approx(0.5, abs=0.08)
    areas = [draw.box.height * draw.box.width / 1200 for draw in draws]
    assert 0.25 < min(areas) < 0.4
    assert max(areas) > 0.9
    factors = np.array([draw.jitter[1:] for draw in draws if draw.jitter])
    assert np.allclose(np.abs(factors - [1, 1, 1, 0]).max(axis=0), (0.4, 0.4, 0.2, 0.1), rtol=0.1)
    assert len({draw.jitter.order for draw in draws if draw.jitter}) == 24


def test_where_no_part_fits_the_middle_is_taken():
    assert draw_box(10, 100, (1.0, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0)) == Box(0, 43, 10, 13)


def test_a_second_crop_keeps_the_size():
    values = torch.arange(2 * 8 * 4.0).reshape(1, 16, 4).expand(3, -1, -1)
    part = values[:, 2:10, 1:3]
    assert recrop(values, Box(2, 1, 8, 2), 0).shape == values.shape
    assert torch.equal(recrop(values, Box(2, 1, 8, 2), 0)[:, ::2, ::2], part)
    assert torch.allclose(recrop(values, Box(0, 0, 16, 4), 3), values, atol=1e-4)


def test_always_as_many_are_hidden():
    mask = PairMask(8, 4, total=16, least=2, most=6)
    masks = [mask(Random(seed)) for seed in range(20)]
    assert {int(each.sum()) for each in masks} == {16}
    assert len({each.tobytes() for each in masks}) == 20
    assert np.array_equal(mask(Random(3)), masks[3])
    assert mask.lower_half()[4:].all()
    assert not mask.lower_half()[:4].any()
    assert PairMask()(Random(0)).sum() == 784


def test_where_there_is_no_annotation_there_is_no_loss():
    pixels = np.zeros((40, 20, 3), np.uint8)
    pixels[:20, :10] = 200
    target = normalised(Image.fromarray(pixels))
    for task in ("semantic", "depth"):
        weights = loss_weights(target, task)
        assert weights[:, :20, :10].min() == 1, task
        assert weights.sum() == 3 * 20 * 10, task
    assert loss_weights(target, "derain").min() == 1
    joints = loss_weights(target, "keypoints")
    assert (joints[:, :20, :10] == 10).all()
    assert joints[:, 20:].unique().tolist() == [1]
    assert loss_weights(target, "instances").unique().tolist() == [1]
    few = target.clone()
    few[:, :20, 4:] = normalised(Image.new("RGB", (16, 20)))
    for task in ("keypoints", "instances"):
        assert loss_weights(few, task).max() == 0, task
    assert BLACK < 1 / 255


def test_tasks_have_their_own():
    assert filters_of("semantic") == filters_of("instances") == (3, 0)
    assert filters_of("depth") == filters_of("keypoints") == filters_of("derain") == (3, 3)
    assert PairAugmentation.of_task("instances", 8) == PairAugmentation(8, (0.9999, 1.0), 0.0, 0.0)
    assert PairAugmentation.of_task("depth", 8) == PairAugmentation(8)


def test_numbers_out_of_range_are_refused():
    for options, message in (
        ({"jitter": 2}, "jitter"),
        ({"scale": (0.5, 2.0)}, "scale, highest"),
        ({"size": 0}, "size"),
    ):
        with pytest.raises(ValueError, match=message):
            PairAugmentation(**options)
    with pytest.raises(ValueError, match="must have the same size"):
        PairAugmentation(8).apply(IMAGE, IMAGE.resize((8, 8)), Draw(Box(0, 0, 8, 8)), filters=(3, 3))
