"""What ships for first steps."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

import hfvlm
from hfvlm.release.untrained import KINDS, untrained
from hfvlm.release.verification import VerificationError, verify
from hfvlm.samples.scenes import MovingScene, Scene

# Others have tests of their own that begin with these folders' parts.
SELDOM = ("align", "blip2", "clip", "filip", "flamingo", "flava", "languagebind", "pg_video_llava", "siglip")
EVERY = [pytest.param(name, marks=[pytest.mark.integration] * (name in SELDOM)) for name in KINDS]


@pytest.mark.parametrize("architecture", EVERY)
def test_untrained_models_are_whole(architecture, tmp_path):
    folder = untrained(architecture, tmp_path / "model")
    checks = verify(folder)
    # A model that learned nothing need not tell one image from another.
    assert [check for check in checks if not check.passed and "gives another answer" not in check.name] == []
    assert AutoProcessor.from_pretrained(folder).modalities


@pytest.mark.parametrize("kind", ["MultipleChoice", "VideoMultipleChoice"])
def test_models_that_choose_are_whole(kind, tmp_path):
    folder = untrained("merlot_reserve", tmp_path / "model", model=f"HfvlmMERLOTReserveFor{kind}")
    assert [check for check in verify(folder) if not check.passed and "gives another answer" not in check.name] == []


def test_untrained_models_are_the_same_again(tmp_path):
    first, second, third = (untrained("coca", tmp_path / str(i), seed=i // 2) for i in range(3))
    a, b, c = (AutoModel.from_pretrained(folder).state_dict() for folder in (first, second, third))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_the_class_can_be_chosen(tmp_path):
    folder = untrained("blip", tmp_path / "vqa", model="HfvlmBLIPForQuestionAnswering")
    assert type(AutoModel.from_pretrained(folder)) is hfvlm.HfvlmBLIPForQuestionAnswering
    with pytest.raises(FileExistsError, match="overwrite=True"):
        untrained("blip", folder)
    assert type(AutoModel.from_pretrained(untrained("blip", folder, overwrite=True))) is hfvlm.HfvlmBLIPModel


def test_what_there_is_no_sample_of(tmp_path):
    with pytest.raises(ValueError, match="no untrained clap; there are align, blip, "):
        untrained("clap", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_scenes_are_drawn_alike_without_chance():
    scene = Scene("red", "circle", "large")
    assert np.array_equal(scene.render(), scene.render())
    assert np.asarray(scene.render()).shape == (32, 32, 3)
    moving = MovingScene("red", "circle", "left")
    assert np.array_equal(moving.render(), moving.render())


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("config.json", '{"model_type": "hfvlm_coca", "vision_config": 7}'),
        ("config.json", '{"model_type": "hfvlm_coca", "vision_config": {"patch_size": 0}}'),
        ("processor_config.json", "[]"),
        ("processor_config.json", "{}"),
        ("processor_config.json", '{"processor_class": "Absent"}'),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
    ],
)
def test_folders_that_cannot_be_loaded_are_refused_in_one_line(tmp_path, file, content):
    folder = untrained("coca", tmp_path / "model")
    (folder / file).write_text(content)
    with pytest.raises((ValueError, OSError)) as refused:
        verify(folder)
    assert type(refused.value) is not KeyError
    if isinstance(refused.value, VerificationError):
        assert "\n" not in str(refused.value)
        assert str(folder) in str(refused.value)
