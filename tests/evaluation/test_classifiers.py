"""Classifiers that were trained, by their own classes."""

import numpy as np
import pytest
import torch
from PIL import Image

import hfvlm
from hfvlm.evaluation.tasks import Data, evaluate
from hfvlm.samples.scenes import all_scenes

# In another order than folders are read in.
CLASSES = ["red", "light_green", "blue"]


@pytest.fixture(scope="module")
def classifier(clip_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "model"
    config = hfvlm.HfvlmCLIPConfig.from_pretrained(clip_folder)
    config.id2label = dict(enumerate(CLASSES))
    torch.manual_seed(0)
    hfvlm.HfvlmCLIPForImageClassification(config).save_pretrained(folder)
    hfvlm.HfvlmCLIPProcessor.from_pretrained(clip_folder).image_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    for scene in all_scenes():
        name = {"green": "light green"}.get(scene.colour, scene.colour)
        if name.replace(" ", "_") in CLASSES:
            place = tmp_path / "images" / "test" / name
            place.mkdir(parents=True, exist_ok=True)
            scene.render().save(place / f"{scene.shape}-{scene.size}.png")
    (tmp_path / "images" / "test" / "blue" / "damaged.png").write_bytes(b"no image")
    return tmp_path / "images"


def test_classes_are_those_of_the_same_name(classifier, images):
    report = evaluate("classification", classifier, Data(str(images)), device="cpu")
    model = hfvlm.HfvlmCLIPForImageClassification.from_pretrained(classifier).eval()
    processor = hfvlm.HfvlmCLIPImageProcessor.from_pretrained(classifier)
    paths = sorted(path for path in images.rglob("*.png") if path.stem != "damaged")
    with torch.no_grad():
        logits = model(**processor([Image.open(path) for path in paths], return_tensors="pt")).logits
    right = [
        CLASSES[i] == path.parent.name.replace(" ", "_") for i, path in zip(logits.argmax(-1), paths, strict=True)
    ]
    values = {result.metric: result.value for result in report.results}
    assert values["accuracy"] == pytest.approx(np.mean(right))
    assert 0 < values["accuracy"] < 1
    assert values["accuracy@5"] == 1
    assert report.rows == len(paths)
    assert ["damaged.png" in error for error in report.errors.values()] == [True]


def test_what_is_no_classifier_or_none_of_its_classes_is_refused(classifier, clip_folder, images):
    with pytest.raises(
        ValueError, match=r"HfvlmCLIPModel, not HfvlmCLIPForImageClassification: it lacks 2 of its weigh"
    ):
        evaluate("classification", clip_folder, Data(str(images)), device="cpu")
    (images / "test" / "blue").rename(images / "test" / "dog")
    with pytest.raises(ValueError, match="label 'dog' is none of the model's: red, light_green, blue"):
        evaluate("classification", classifier, Data(str(images)), device="cpu")


def test_towers_without_the_rest_embed_nothing(classifier):
    """What is missing would be random numbers."""
    message = r"holds HfvlmCLIPForImageClassification, not HfvlmCLIPModel: it lacks \d+ of its weights"
    with pytest.raises(ValueError, match=message):
        hfvlm.Embedder.from_pretrained(classifier)
