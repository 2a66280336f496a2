"""Annotations as images, and back."""

import numpy as np
import pytest
import torch

from hfvlm.models.painter import codes, instances, keypoints


def test_palettes_have_no_color_twice_and_no_black():
    for palette in (codes.class_colors(), codes.coco_colors(), codes.palette_of(7), instances.place_colors()):
        assert len(np.unique(palette, axis=0)) == len(palette)
        assert palette.max(axis=1).min() > 0
    assert len(codes.COCO_IDS) == len(codes.coco_colors()) == 133
    assert codes.COCO_IDS[codes.COCO_THINGS - 1] == 90


def test_classes_survive_small_changes_of_color():
    random = np.random.default_rng(0)
    classes = random.integers(0, 150, (20, 30))
    image = codes.encode_classes(classes).astype(int) + random.integers(-20, 21, (20, 30, 3))
    for kind in codes.DISTANCES:
        assert np.array_equal(codes.decode_classes(image, kind=kind), classes)


def test_what_is_no_class_is_black():
    assert codes.encode_classes(np.array([[-1, 0]]))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_colors_may_be_given():
    colors = np.array([[255, 0, 0], [0, 0, 255]])
    image = codes.encode_classes(np.array([[1, 0]]), colors)
    assert image[0].tolist() == [[0, 0, 255], [255, 0, 0]]
    assert codes.decode_classes(image, colors).tolist() == [[1, 0]]


def test_large_images_are_read_in_parts(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3))
    whole = codes.class_distances(image).argmin(dim=-1)
    monkeypatch.setattr(codes, "PIXELS", 20)
    assert np.array_equal(codes.decode_classes(image), whole.numpy())


def test_depths_stop_at_ten_metres():
    image = codes.encode_depth(np.array([[0, 5000, 10_000, 65_535]]))
    assert image[0].tolist() == [[0] * 3, [127] * 3, [255] * 3, [255] * 3]


def test_matrix_nms_lowers_what_overlaps_with_a_better_one():
    """By its definition, pair by pair."""
    random = np.random.default_rng(0)
    masks = torch.from_numpy(random.random((6, 8, 8)) < 0.4)
    classes, scores = torch.tensor([1, 1, 2, 1, 2, 1]), torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    overlap = torch.zeros(6, 6)
    for i in range(6):
        for j in range(i):
            if classes[i] == classes[j]:
                overlap[j, i] = (masks[i] & masks[j]).sum() / (masks[i] | masks[j]).sum()
    worst = overlap.amax(dim=0)
    for kernel in ("gaussian", "linear"):
        expected = []
        for i in range(6):
            factors = [
                torch.exp(-2 * overlap[j, i] ** 2) / torch.exp(-2 * worst[j] ** 2)
                if kernel == "gaussian"
                else (1 - overlap[j, i]) / (1 - worst[j])
                for j in range(6)
            ]
            expected.append(scores[i] * min(factors))
        found, labels, kept_masks, kept = instances.matrix_nms(masks, classes, scores, kernel=kernel)
        assert found.tolist() == pytest.approx(sorted(map(float, expected), reverse=True), abs=1e-6)
        assert torch.equal(labels, classes[kept])
        assert torch.equal(kept_masks, masks[kept])
    assert len(instances.matrix_nms(masks, classes, scores, most=2)[0]) == 2
    assert len(instances.matrix_nms(masks, classes, scores, before=3)[0]) == 3
    assert instances.matrix_nms(masks, classes, scores, least=0.5)[0].min() >= 0.5
    assert len(instances.matrix_nms(masks[:0], classes[:0], scores[:0])[3]) == 0


def test_nothing_painted_is_no_instance():
    found = instances.decode_instances(np.zeros((6, 8, 3)), threshold=5)
    assert (found.masks.shape, found.masks.any(), found.scores.tolist()) == ((1, 6, 8), False, [0.0])
    near, nearest, _ = instances.decode_nearest(np.zeros((6, 8, 3)))
    assert near.classes.tolist() == [0]
    assert (nearest == 6400).all()


def test_instances_are_painted_by_where_they_are():
    masks = np.zeros((2, 40, 40), bool)
    masks[0, :2, :2], masks[1, -2:, -2:] = True, True
    image = instances.encode_instances(masks)
    assert image[0, 0].tolist() == [255, 255, 255 - 13 * int(0.5 / 40 * 79)]
    assert (image[-1, -1] < image[0, 0]).all()
    assert image[20, 20].tolist() == [0, 0, 0]


def test_a_joint_is_reddest_at_its_place():
    joints = np.array([[10.2 + 8 * (i % 4), 12 + 9 * (i // 4)] for i in range(17)])
    visible = np.ones(17)
    visible[3] = 0
    image = keypoints.encode_keypoints(joints, visible, size=(64, 48))
    found = keypoints.peaks(keypoints.decode_keypoints(image))
    seen = visible > 0
    assert np.abs(found[seen, :2] - joints[seen]).max() <= 1
    assert found[3, 2] == 0
    outside = keypoints.heat_maps(np.array([[-30.0, 5.0], [47.0, 63.0]]), size=(64, 48))
    assert outside[0].max() == 0
    assert outside[1].max() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: codes.palette_of("cityscapes"), "none of ade20k, coco"),
        (lambda: codes.palette_of(np.zeros((3, 2))), r"must be \(classes, 3\) colours"),
        (lambda: codes.palette_of(0), "count must be"),
        (lambda: codes.encode_classes(np.array([[150]])), "Classes of 150 to 150: the palette has 150"),
        (lambda: codes.encode_classes(np.zeros((2, 2))), r"\(H, W\) integers"),
        (lambda: codes.class_distances(np.zeros((2, 2, 3)), kind="rms"), "none of abs, square, mean"),
        (lambda: codes.decode_classes(np.zeros((2, 2, 4))), r"\(H, W, 3\), not \(2, 2, 4\)"),
        (lambda: codes.encode_depth(np.array([[np.nan]])), "finite"),
        (lambda: instances.encode_instances(np.zeros((1, 4, 4))), "empty mask"),
        (lambda: instances.encode_instances(np.ones((1, 4, 4)), [[9, 9, 12, 12]]), "outside of an image of 4 x 4"),
        (lambda: instances.encode_instances(np.ones((2, 4, 4)), [[0, 0, 2, 2]]), "2 masks need as many boxes"),
        (lambda: instances.matrix_nms(*[torch.zeros(1)] * 3, kernel="box"), "none of gaussian, linear"),
        (lambda: instances.candidates(np.zeros((2, 2, 3)), 0), "threshold must be"),
        (lambda: keypoints.encode_keypoints(np.zeros((16, 2))), "16 joints: there are colours for 17"),
        (lambda: keypoints.heat_maps(np.zeros((17, 3))), r"\(N, 2\), x and y"),
    ],
)
def test_what_is_no_annotation_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
