"""Boxes that models find against those that are drawn."""

import json

import numpy as np
import pytest
from transformers import AutoProcessor

import hfvlm
from hfvlm.evaluation.grounding import read_boxes
from hfvlm.evaluation.tasks import Data, evaluate
from hfvlm.inference.captioner import Captioner
from hfvlm.processing.grounding import intersection_over_union
from hfvlm.samples import scenes

# Of each row: its box, and the one that is answered.
BOXES = [
    ([0, 0, 20, 20], [0, 0, 20, 20]),
    ([0, 0, 20, 20], [0, 0, 20, 10]),
    ([0, 0, 20, 20], [0, 0, 20, 8]),
    ([8, 8, 24, 24], None),
]


@pytest.fixture(scope="module")
def untrained_folder(tmp_path_factory):
    """A model's folder, written once."""
    root = tmp_path_factory.mktemp("models")
    return lambda name: root / name if (root / name).exists() else hfvlm.untrained(name, root / name)


@pytest.fixture(scope="module")
def untrained_processor(untrained_folder):
    return lambda name: AutoProcessor.from_pretrained(untrained_folder(name))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Images with a box each, the first with two expressions, and two that have none."""
    folder = tmp_path_factory.mktemp("boxes") / "test"
    folder.mkdir()
    random = np.random.RandomState(0)
    boxes = [box for box, _ in BOXES] + [[5, 5, 5, 9], [1, 2, 3, None]]
    with (folder / "metadata.jsonl").open("w") as metadata:
        for i, box in enumerate(boxes):
            kind = scenes.all_scenes()[i]
            kind.render(random).save(folder / f"{i}.png")
            texts = [kind.caption(), "the shape"] if i == 0 else [kind.caption()]
            metadata.write(json.dumps({"file_name": f"{i}.png", "text": texts, "box": box}) + "\n")
    return folder.parent


def value(report, metric):
    return next(result.value for result in report.results if result.metric == metric)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([0, 0, 4, 4], [0, 0, 4, 4], 1),
        ([0, 0, 4, 4], [4, 0, 8, 4], 0),
        ([0, 0, 4, 4], [2, 2, 6, 6], 4 / 28),
        ([0, 0, 4, 4], [1, 1, 1, 1], 0),
        ([0, 0, 10, 10], [2, 2, 4, 7], 10 / 100),
        ([3, 3, 3, 3], [3, 3, 3, 3], 0),
    ],
)
def test_overlap(left, right, expected):
    assert intersection_over_union(left, right) == intersection_over_union(right, left) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("architecture", "prompt"),
    [
        ("qwen_vl", "<ref>a small red circle</ref><box>"),
        ("shikra", "could you find and tell me the coordinates of a small red circle?"),
        ("paligemma", "<image>detect a small red circle\n"),
        ("pali", "<image>detect a small red circle <extra_id_0>"),
    ],
)
def test_answers_are_compared_with_boxes(architecture, prompt, drawn, untrained_folder, monkeypatch):
    folder = untrained_folder(architecture)
    prompts = []

    def answer(captioner, images, texts, **options):
        """The boxes that rows are to be answered with, as the model writes them in its own answers."""
        prompts.extend(texts)
        boxes = [BOXES[int(path_number(image))][1] for image in images]
        written = [
            "nothing" if box is None else captioner.processor.grounding_text(None, [box], (32, 32)) for box in boxes
        ]
        return [text.removeprefix("<box>") for text in written]

    monkeypatch.setattr(Captioner, "__call__", answer)
    report = evaluate("grounding", folder, Data(str(drawn)))
    assert len(prompts) == 5
    assert prompt in prompts[0].replace("<im_start>", "")
    assert value(report, "mean IoU") == pytest.approx((1 + 1 + 0.5 + 0.4 + 0) / 5, abs=0.03)
    assert value(report, "answers with a box") == 4 / 5
    accuracy = value(report, "accuracy@0.5")
    assert accuracy in (2 / 5, 3 / 5)  # a box of half the size ends at a multiple of the model's own unit
    assert accuracy == np.mean(
        [score >= 0.5 for row, score in report.each["mean IoU"].items() for _ in range(2 - bool(row))]
    )
    assert list(report.errors) == [4, 5]
    assert "left, top, right and bottom in pixels" in report.errors[5]
    assert report.protocol["expressions"] == 5
    assert report.mistakes[0].text == f"{scenes.all_scenes()[3].caption()}: nothing"


def test_boxes_that_no_image_has_are_left_out(tmp_path):
    """Shares of the image and boxes of another size would count as never found."""
    image = scenes.all_scenes()[0].render()  # of 32 x 32 pixels
    kinds = {
        "not shares of the image": [[0, 0, 1, 1], [0.1, 0.2, 0.5, 0.6]],
        "not within the image of 32 x 32 pixels": [[4, 4, 34, 8], [4, 4, 8, 34], [-2, 4, 8, 8]],
        "left, top, right and bottom": ["1,2,3,4", [8, 8, 4, 12], None],
    }
    values = [value for own in kinds.values() for value in own]
    found, sizes, errors = read_boxes(
        [[0, 0, 32.5, 32], *values, [1, 1, 2, 2]], [image] * 9 + [str(tmp_path / "no.png")]
    )
    assert (found, sizes) == ({0: [0, 0, 32.5, 32]}, {0: (32, 32)})
    for row, message in enumerate([kind for kind, own in kinds.items() for _ in own], 1):
        assert message in errors[row]
    assert "no.png" in errors[9]


@pytest.mark.parametrize("architecture", ["qwen_vl", "shikra", "paligemma", "pali"])
def test_boxes_that_are_none_are_not_formatted(architecture, untrained_processor):
    processor = untrained_processor(architecture)
    for box in ([1, 2, 3], [9, 1, 3, 4], [float("nan"), 1, 3, 4], None, "1234"):
        if architecture != "shikra" or box is not None:
            with pytest.raises(ValueError, match="left, top, right and bottom"):
                processor.grounding_text("dog", [box], (32, 32))


def test_data_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        Data("nowhere").rows()
    (tmp_path / "text" / "test").mkdir(parents=True)  # also the name of one of the readers of `datasets`
    (tmp_path / "text" / "test" / "rows.jsonl").write_text('{"box": [1, 2}\n')
    with pytest.raises(ValueError, match="text: .*JSON"):
        Data("text").rows()


def path_number(image):
    from hfvlm.media.rows import path_of

    return path_of(image).rpartition("/")[2].removesuffix(".png")


def test_a_model_that_learned_nothing_finds_nothing(drawn, untrained_folder):
    """The whole way, from images to a report."""
    folder = untrained_folder("qwen_vl")
    report = evaluate("grounding", folder, Data(str(drawn)), generate={"max_new_tokens": 3}, device="cpu")
    assert [result.value for result in report.results] == [0, 0, 0]
    assert report.rows == len(report.mistakes) == 5


def test_what_cannot_be_measured_is_refused(drawn, small_blip):
    blip = small_blip("HfvlmBLIPForConditionalGeneration")
    with pytest.raises(
        ValueError, match="HfvlmBLIPForConditionalGeneration finds no boxes; Shikra, Qwen-VL and PaliGemma do"
    ):
        evaluate("grounding", blip, Data(str(drawn)))
    with pytest.raises(ValueError, match="has no column for box"):
        evaluate("grounding", blip, Data(str(drawn), columns={"box": "bbox"}))
