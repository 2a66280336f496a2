"""Names and templates of the data sets of CLIP's paper."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from typer.testing import CliRunner

import hfvlm
from hfvlm.cli.commands import app
from hfvlm.evaluation.prompt_sets import load_prompt_set, prompt_sets
from hfvlm.evaluation.tasks import Data, evaluate
from hfvlm.samples.digits import load_digits

# Classes and templates, as counted in the authors' files.
COUNTS = {
    "birdsnap": (500, 1), "caltech101": (102, 34), "cifar10": (10, 18), "cifar100": (100, 18), "clevr-counts": (8, 1),
    "country211": (211, 5), "describable-textures": (47, 8), "eurosat": (10, 3),
    "facial-emotion-recognition-2013": (7, 6), "fgvc-aircraft": (100, 2), "flowers102": (102, 1), "food101": (101, 1),
    "gtsrb": (43, 3), "hateful-memes": (2, 1), "imagenet": (1000, 80), "kinetics700": (700, 28), "kitti": (4, 1),
    "mnist": (10, 1), "oxford-pets": (37, 1), "pascal-voc-2007": (20, 1), "patch-camelyon": (2, 1),
    "resisc45": (45, 18), "sst2": (2, 1), "stanford-cars": (196, 8), "stl10": (10, 2), "sun397": (397, 2),
    "ucf101": (101, 48),
}  # fmt: skip


def test_every_data_set_of_the_paper_is_there():
    assert prompt_sets() == sorted(COUNTS)
    sets = {name: load_prompt_set(name) for name in COUNTS}
    assert {name: (len(own.classes), len(own.templates)) for name, own in sets.items()} == COUNTS
    for own in sets.values():
        assert all(template.count("{}") == 1 for template in own.templates)
        assert all(names and all(name == name.strip() for name in names) for names in own.classes.values())
    assert sets["facial-emotion-recognition-2013"].classes["happy"] == ["happy", "smiling"]
    assert sets["imagenet"].classes["missile (2)"] == ["missile"]
    assert sets["hateful-memes"].metric == "ROC AUC"
    assert sets["eurosat"].templates[0] == "a centered satellite photo of {}."


def test_unknown_prompts_are_refused_with_the_nearest(clip_folder):
    with pytest.raises(ValueError, match="No prompts are called 'CIFAR-10'; the nearest are 'cifar10'"):
        load_prompt_set("CIFAR-10")
    result = CliRunner().invoke(
        app, ["eval", str(clip_folder), "--task", "zero-shot", "--data", ".", "--prompts", "food"]
    )
    assert result.exit_code == 1
    assert "the nearest are 'food101'" in str(result.exception)


def test_labels_are_matched_by_name_or_by_order():
    ten = load_prompt_set("cifar10")
    names = list(ten.classes)
    assert ten.numbers(["Truck", "cat", "AIRPLANE"]) == [9, 3, 0]
    assert ten.numbers(sorted(names, reverse=True)) == list(range(9, -1, -1))
    assert ten.numbers([f"n{i:02}" for i in range(10)]) == list(range(10))
    assert load_prompt_set("facial-emotion-recognition-2013").numbers(["smiling"]) == [3]
    assert load_prompt_set("imagenet").numbers(["great_white_shark", "missile"]) == [2, 657]
    with pytest.raises(ValueError, match="label 'lorry' is none of its 10 classes; the nearest is"):
        ten.numbers([*names[:9], "lorry"])
    with pytest.raises(ValueError, match="label 'n00' is none of its 10 classes"):
        ten.numbers(["n00", "n01"])


def digits_in(folder, names):
    """Six digits in a folder of each name."""
    kept = load_digits("test")[:40]
    for i, digit in enumerate(kept):
        (folder / "test" / names[i % len(names)]).mkdir(parents=True, exist_ok=True)
        digit.image.save(folder / "test" / names[i % len(names)] / f"{i}.png")
    return folder


def value(report, metric):
    return next(result.value for result in report.results if result.metric == metric)


def test_classes_and_templates_are_those_of_the_set(clip_folder, tmp_path):
    """In folders whose order is not that of the names."""
    prompts = load_prompt_set("eurosat")
    names = list(prompts.classes)
    assert names != sorted(names)
    data = Data(str(digits_in(tmp_path, [name.title() for name in names])))
    report = evaluate("zero-shot", clip_folder, data, prompts="eurosat")
    embedder = hfvlm.Embedder.from_pretrained(clip_folder, device="cpu")
    texts = [template.replace("{}", name) for name in names for template in prompts.templates]
    classes = embedder.encode(text=texts).reshape(10, len(prompts.templates), -1).mean(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    rows = data.rows()
    truth = [names.index(rows.features["label"].names[label].lower()) for label in rows["label"]]
    scores = embedder.encode(image=list(rows["image"])) @ classes.T
    assert value(report, "accuracy") == pytest.approx(accuracy_score(truth, scores.argmax(axis=1)))
    assert value(report, "accuracy@5") == pytest.approx(top_k_accuracy_score(truth, scores, k=5))
    assert value(report, "mean-per-class accuracy") == pytest.approx(
        balanced_accuracy_score(truth, scores.argmax(axis=1))
    )
    assert report.protocol["templates"] == "3 of eurosat"
    assert report.protocol["the metric of CLIP's paper"] == "accuracy"
    own = evaluate("zero-shot", clip_folder, data, prompts="eurosat", templates="single")
    assert own.protocol["templates"] == "single"


def test_labels_that_are_no_names_are_refused(clip_folder, tmp_path):
    data = Data(str(digits_in(tmp_path, ["forest", "river", "mountain"])))
    with pytest.raises(ValueError, match="Prompts eurosat: label 'mountain' is none of its 10 classes"):
        evaluate("zero-shot", clip_folder, data, prompts="eurosat")
    with pytest.raises(ValueError, match="labels and prompts eurosat both name the classes"):
        evaluate("zero-shot", clip_folder, data, prompts="eurosat", labels=["a", "b", "c"])
