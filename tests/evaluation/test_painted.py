"""Paintings of a Painter against true ones: each metric equals the same by hand."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import hfvlm
from hfvlm.cli.commands import app
from hfvlm.evaluation.painting import confusion, depth_errors, psnr, segmentation_scores, ssim
from hfvlm.evaluation.tasks import Data, evaluate
from hfvlm.media.images import read_image

SIZE, CLASSES = 24, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hfvlm.untrained("painter", tmp_path_factory.mktemp("painter") / "model")


def targets_of(kind, random):
    if kind == "segmentation":
        classes = random.randint(0, CLASSES, (SIZE, SIZE), dtype=np.uint8)
        classes[:4] = 255  # without a class
        return Image.fromarray(classes)
    if kind == "depth":
        return Image.fromarray(random.randint(0, 9000, (SIZE, SIZE)).astype(np.uint16))
    return Image.fromarray(random.randint(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Of each task, three rows in each split; the last of the test has a target of another size."""
    root, random = tmp_path_factory.mktemp("painted"), np.random.RandomState(0)
    for kind in ("segmentation", "depth", "restoration"):
        for split in ("train", "test"):
            place = root / f"{kind}-rows" / split
            place.mkdir(parents=True)
            rows = []
            for i in range(3):
                Image.fromarray(random.randint(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(place / f"{i}.png")
                target = targets_of(kind, random)
                if (split, i) == ("test", 2):
                    target = target.crop((0, 0, 9, 9))
                path = root / f"{kind}-{split}-{i}.png"
                target.save(path)
                rows.append({"file_name": f"{i}.png", "target": str(path)})
            (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def by_hand(folder, drawn, kind, task, annotation, **options):
    """What is painted for the first two rows of the test, shown by the first of the training, and what is true."""
    painter = hfvlm.Painter.from_pretrained(folder, device="cpu")
    places = {split: drawn / f"{kind}-rows" / split for split in ("train", "test")}
    truth = {split: annotation(read_image(drawn / f"{kind}-{split}-0.png")) for split in places}
    prompt = painter.prompt(places["train"] / "0.png", truth["train"], task, **options)
    found = painter([places["test"] / f"{i}.png" for i in range(2)], prompt, task=task, batch_size=2, **options)
    return found, [annotation(read_image(drawn / f"{kind}-test-{i}.png")) for i in range(2)]


def values(report):
    return {result.metric: result.value for result in report.results}


def classes_of(image):
    numbers = np.asarray(image).astype(np.int64)
    return np.where(numbers < CLASSES, numbers, -1)


def test_maps_of_classes(folder, drawn):
    report = evaluate("segmentation", folder, Data(str(drawn / "segmentation-rows")), palette=CLASSES, device="cpu")
    found, truth = by_hand(folder, drawn, "segmentation", "semantic", classes_of, palette=CLASSES)
    scores = segmentation_scores(sum(confusion(*pair, CLASSES) for pair in zip(found, truth, strict=True)))
    assert {name: values(report)[name] for name in scores} == pytest.approx(scores)
    assert all(result.low <= result.value + 1e-9 and result.value <= result.high + 1e-9 for result in report.results)
    assert report.rows == 2
    assert "target is (9, 9), the image (24, 24)" in report.errors[2]
    assert report.protocol["shown by"] == "row 0 of train"


def test_depths(folder, drawn):
    report = evaluate("depth", folder, Data(str(drawn / "depth-rows")), device="cpu")
    found, truth = by_hand(folder, drawn, "depth", "depth", lambda image: np.asarray(image).astype(np.int64))
    expected = [depth_errors(a / 1000, b / 1000) for a, b in zip(found, truth, strict=True)]
    assert values(report) == pytest.approx({name: np.mean([e[name] for e in expected]) for name in expected[0]})
    assert report.each["RMSE"] == {i: round(each["RMSE"], 6) for i, each in enumerate(expected)}


def test_restored_images(folder, drawn):
    report = evaluate("restoration", folder, Data(str(drawn / "restoration-rows")), painting="derain", device="cpu")
    found, truth = by_hand(folder, drawn, "restoration", "derain", lambda image: image)
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(found, truth, strict=True)]
    expected = {"PSNR": np.mean([psnr(*pair) for pair in pairs]), "SSIM": np.mean([ssim(*pair) for pair in pairs])}
    assert values(report) == pytest.approx(expected)
    assert len(report.mistakes) == 2


def test_what_cannot_be_is_refused(folder, drawn, clip_folder):
    data = Data(str(drawn / "depth-rows"))
    with pytest.raises(ValueError, match="shown must be an integer from 0 to 2"):
        evaluate("depth", folder, data, shown=3)
    with pytest.raises(ValueError, match="painting 'dream' is none of denoise"):
        evaluate("restoration", folder, data, painting="dream")
    with pytest.raises(ValueError, match="has no column for target"):
        evaluate("depth", folder, Data(str(drawn / "depth-rows"), columns={"target": "nothing"}))
    colours = Data(str(drawn / "restoration-rows"))
    with pytest.raises(ValueError, match="Row 0 of train, .*: an image of one channel is needed, not RGB"):
        evaluate("depth", folder, colours)
    with pytest.raises(ValueError, match="hfvlm_clip"):
        evaluate("depth", clip_folder, data)


def test_targets_that_no_metric_is_defined_on_are_left_out(folder, tmp_path):
    """A map without a depth, of 8 bits, or of too few pixels ends no evaluation."""
    pixels = np.arange(SIZE * SIZE * 3, dtype=np.uint8).reshape(SIZE, SIZE, 3)
    depths = pixels[..., 0].astype(np.uint16) * 30
    data = {
        "depth": ([depths, depths, depths * 0, depths.astype(np.uint8)], ["no depth is between", "has 8 (L)"]),
        "restoration": ([pixels, pixels, pixels[:5, :9]], ["7 pixels in each direction are needed, not 9 x 5"]),
    }
    for task, (targets, messages) in data.items():
        place = tmp_path / f"{task}-rows" / "test"
        place.mkdir(parents=True)
        rows = []
        for i, target in enumerate(targets):
            Image.fromarray(pixels[: target.shape[0], : target.shape[1]]).save(place / f"{i}.png")
            Image.fromarray(target).save(tmp_path / f"{task}{i}.png")
            rows.append({"file_name": f"{i}.png", "target": str(tmp_path / f"{task}{i}.png")})
        (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        report = evaluate(task, folder, Data(str(place.parent), train_split="test"), device="cpu")
        assert report.rows == 2
        for error, message in zip(report.errors.values(), messages, strict=True):
            assert message in error


def test_the_command(folder, drawn, tmp_path):
    command = [
        "eval",
        str(folder),
        "--task",
        "depth",
        "--data",
        str(drawn / "depth-rows"),
        "--device",
        "cpu",
        "--json",
    ]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "report")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "report" / "report.json").read_text())["task"] == "depth"
