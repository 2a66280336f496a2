import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from hfvlm.models.painter import HfvlmPainterImageProcessor, HfvlmPainterProcessor

GREY = Image.new("RGB", (20, 10), (100, 100, 100))


@pytest.fixture
def processor():
    return HfvlmPainterProcessor(HfvlmPainterImageProcessor(size=16))


def image_of(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


def painted(processor, target):
    """What a model would return that paints a target, an image of the processor's size."""
    return processor(images=GREY, prompts=(GREY, GREY), targets=target)["target_values"]


def test_a_prompt_is_above_its_query(processor):
    prompt, target, query = image_of(0), image_of(1), image_of(2)
    inputs = processor(images=query, prompts=(prompt, target))
    assert set(inputs) == {"pixel_values", "target_values"}
    single = {name: processor.image_processor(image, return_tensors="pt")["pixel_values"][0] for name, image in
              {"prompt": prompt, "target": target, "query": query}.items()}  # fmt: skip
    assert torch.equal(inputs["pixel_values"][0], torch.cat([single["prompt"], single["query"]], dim=1))
    assert torch.equal(inputs["target_values"][0], torch.cat([single["target"]] * 2, dim=1))


def test_a_prompt_for_each_query_or_one_for_all(processor):
    queries, pairs = [image_of(0), image_of(1)], [(image_of(2), image_of(3)), (image_of(4), image_of(5))]
    each = processor(images=queries, prompts=pairs)
    for i in range(2):
        alone = processor(images=queries[i], prompts=pairs[i])
        assert all(torch.equal(each[name][i], alone[name][0]) for name in alone)
    all_of_them = processor(images=queries, prompts=pairs[:1])["target_values"]
    assert torch.equal(all_of_them[0], all_of_them[1])


def test_targets_have_a_filter_of_their_own(processor):
    target = image_of(0)
    nearest = processor(images=GREY, prompts=(target, target), target_resample=0)
    expected = processor.image_processor(target, resample=0, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(nearest["target_values"][0, :, :16], expected)
    assert not torch.equal(nearest["pixel_values"][0, :, :16], expected)


def test_what_is_no_prompt_is_refused(processor):
    with pytest.raises(ValueError, match="prompts must be a pair"):
        processor(images=GREY, prompts=GREY)
    with pytest.raises(ValueError, match="2 images need one prompt, or as many, not 3"):
        processor(images=[GREY] * 2, prompts=[(GREY, GREY)] * 3)
    with pytest.raises(ValueError, match="needs images, and prompts"):
        processor(images=GREY)
    with pytest.raises(ValueError, match="1 images need as many targets, not 2"):
        processor(images=GREY, prompts=(GREY, GREY), targets=[GREY, GREY])
    with pytest.raises(TypeError, match="nearest"):
        processor(images=GREY, prompts=(GREY, GREY), nearest=True)
    with pytest.raises(ValueError, match="resize_mode must be 'squash'"):
        HfvlmPainterImageProcessor(resize_mode="shortest")


def test_images_are_converted_before_they_are_resized(processor):
    """Resized as a palette, colours would not mix."""
    few = image_of(0).quantize(8)
    found = processor.image_processor(few, return_tensors="pt")["pixel_values"]
    expected = processor.image_processor(few.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.equal(found, expected)


def test_each_task_comes_back(processor):
    """Annotations of the processor's size are painted, normalised, and read again."""
    random = np.random.default_rng(0)
    classes = random.integers(0, 150, (16, 16))
    assert np.array_equal(
        processor.decode(painted(processor, processor.encode("semantic", classes)), "semantic", [(16, 16)])[0], classes
    )
    depth = random.integers(0, 10_000, (16, 16))
    found = processor.decode(painted(processor, processor.encode("depth", depth)), "depth", [(16, 16)])[0]
    assert np.abs(found - depth).max() <= 10_000 / 255 + 1
    for task in ("denoise", "image"):
        image = image_of(1, (16, 16))
        again = processor.decode(painted(processor, processor.encode(task, image)), task, [(16, 16)])[0]
        assert np.abs(np.asarray(again).astype(int) - np.asarray(image)).max() <= 1
    masks = np.zeros((2, 16, 16), bool)
    masks[0, 2:6, 2:7], masks[1, 9:15, 8:14] = True, True
    found = processor.decode(painted(processor, processor.encode("instances", masks)), "instances", [(16, 16)], most=9)
    best = found[0].masks[found[0].scores > 0.9].numpy()
    assert all(any(np.array_equal(mask, each) for each in best) for mask in masks)
    joints = np.stack([np.arange(17) * 3 + 6, 40 - 2 * np.arange(17)], axis=1)
    large = HfvlmPainterProcessor(HfvlmPainterImageProcessor(size=64))
    target = large.encode("keypoints", joints, size=(64, 64))
    keypoints = large.decode(painted(large, target), "keypoints", [(64, 64)])[0]
    assert np.abs(keypoints.points[:, :2] - joints).max() <= 1
    assert keypoints.points[:, 2].min() > 0.7


def test_paintings_have_the_queries_sizes(processor):
    reconstruction = torch.randn(2, 3, 32, 16)
    for task in ("semantic", "derain", "depth"):
        shapes = [each.shape[:2] for each in processor.paintings(reconstruction, task, [(10, 20), (7, 5)])]
        assert shapes == [(10, 20), (7, 5)], task
    with pytest.raises(ValueError, match="2 images were painted, 1 sizes"):
        processor.paintings(reconstruction, "depth", [(10, 20)])


def test_instances_get_classes_of_a_second_painting(processor):
    masks = np.zeros((2, 16, 16), bool)
    masks[0, 2:6, 2:7], masks[1, 9:15, 8:14] = True, True
    classes = np.full((16, 16), 100)
    classes[masks[0]], classes[masks[1]] = 7, 30
    where = painted(processor, processor.encode("instances", masks))
    what = painted(processor, processor.encode("semantic", classes, palette="coco"))
    (found,) = processor.decode_instances(where, what, [(16, 16)])
    best = {
        int(found.classes[[torch.equal(m, torch.from_numpy(mask)) for m in found.masks].index(True)]) for mask in masks
    }
    assert best == {7, 30}


def test_unknown_tasks_and_options_are_refused(processor):
    with pytest.raises(ValueError, match="task 'segmentation' is none of image, semantic"):
        processor.encode("segmentation", np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="task 'pose' is none of"):
        processor.decode(torch.zeros(1, 3, 32, 16), "pose", [(16, 16)])
    with pytest.raises(TypeError, match="depth got an unexpected keyword argument 'palette'"):
        processor.decode(torch.zeros(1, 3, 32, 16), "depth", [(16, 16)], palette=3)
    with pytest.raises(TypeError, match="semantic got an unexpected keyword argument 'boxes'.*'palette'"):
        processor.encode("semantic", np.zeros((2, 2), int), boxes=[])


def test_saves_and_loads(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, target_resample=0)
    assert type(loaded) is HfvlmPainterProcessor
    assert (loaded.image_processor.size, loaded.image_processor.target_resample) == ({"height": 16, "width": 16}, 0)
