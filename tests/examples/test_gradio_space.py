"""The example of a Space: its calls of hfvlm, behind a Gradio that only records what it is given."""

import runpy
import sys
from types import ModuleType, SimpleNamespace

import pytest

from hfvlm.samples.scenes import Scene
from tests.serving.conftest import write_tone
from tests.support.paths import EXAMPLES

EXAMPLE = EXAMPLES / "gradio_space.py"
PARTS = {"Interface", "Image", "Audio", "Textbox", "Dropdown", "Label"}


class Error(Exception):
    """As gradio.Error."""


@pytest.fixture(scope="module")
def space():
    gradio = ModuleType("gradio")
    gradio.Error = Error
    for name in PARTS:
        setattr(
            gradio, name, lambda *values, kind=name, **options: SimpleNamespace(kind=kind, values=values, **options)
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gradio", gradio)
        patch.delenv("MODEL", raising=False)
        return runpy.run_path(str(EXAMPLE))


def test_it_has_at_most_forty_lines():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 40


def test_it_classifies(space, tmp_path):
    page = space["page"]
    function, inputs, label = page.values
    assert [part.kind for part in inputs] == ["Image", "Audio", "Textbox", "Dropdown"]
    assert label.kind == "Label"
    image, audio = tmp_path / "a.png", tmp_path / "a.wav"
    Scene("red", "circle", "large").render(pixels=48).save(image)
    write_tone(audio, 440)
    for templates in inputs[3].values[0]:
        found = function(str(image), None, inputs[2].values[0], templates)
        assert max(found, key=found.get) == "red circle"
        assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert set(function(None, str(audio), "a\nb\n\na\n", "single")) == {"a", "b"}


def test_what_it_refuses(space, tmp_path):
    classify = space["classify"]
    broken = tmp_path / "a.png"
    broken.write_bytes(b"")
    for image, audio, labels, words in (
        (None, None, "a", "Give labels"), ("a", "b", "a", "Give labels"), (str(broken), None, " \n", "Give labels"),
        (str(broken), None, "a", "image"),
    ):  # fmt: skip
        with pytest.raises(Error, match=words):
            classify(image, audio, labels, "single")
