"""The hash of data, by their content."""

import shutil

import pytest

from hfvlm.evaluation.fingerprints import fingerprint
from hfvlm.evaluation.tasks import Data, evaluate
from hfvlm.samples import scenes


@pytest.fixture
def folder(tmp_path):
    for i, kind in enumerate(scenes.all_scenes()[::8]):
        (tmp_path / "data" / "test" / kind.colour).mkdir(parents=True, exist_ok=True)
        kind.render().save(tmp_path / "data" / "test" / kind.colour / f"{i}.png")
    return tmp_path / "data"


def test_files_count_by_their_bytes(tmp_path):
    one, two = tmp_path / "one.npy", tmp_path / "two.npy"
    one.write_bytes(b"1")
    two.write_bytes(b"1")
    paths = [fingerprint({"depth": [value]}) for value in (str(one), {"path": str(two), "bytes": None}, b"1")]
    assert len(set(paths)) == 1
    two.write_bytes(b"2")
    assert fingerprint({"depth": [str(two)]}) != paths[0]
    assert fingerprint({"text": [str(one)]}) != fingerprint({"text": [str(two)]})  # texts are texts


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"text": ["a", "b"]}, {"text": ["b", "a"]}),
        ({"text": ["a", "b"]}, {"text": [["a", "b"]]}),
        ({"label": [1]}, {"label": ["1"]}),
        ({"label": [None]}, {"label": [0]}),
        ({"text": ["a"], "label": [0]}, {"text": ["a"]}),
        ({"image": ["missing.png"]}, {"image": ["missing too.png"]}),
        ({"image": [b"a"]}, {"image": [{"bytes": b"b", "path": "a"}]}),
    ],
)
def test_other_values_and_orders_have_others(one, two):
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(one) == fingerprint(dict(one))


def test_reports_name_the_content_wherever_it_is(clip_folder, folder, tmp_path):
    first = evaluate("zero-shot", clip_folder, Data(str(folder)))
    shutil.copytree(folder, tmp_path / "moved")
    moved = evaluate("zero-shot", clip_folder, Data(str(tmp_path / "moved")))
    assert first.about["fingerprint"] == moved.about["fingerprint"]
    shutil.copy(*sorted((tmp_path / "moved").rglob("*.png"))[:2])
    changed = evaluate("zero-shot", clip_folder, Data(str(tmp_path / "moved")))
    assert changed.about["fingerprint"] != first.about["fingerprint"]
    assert (
        evaluate("zero-shot", clip_folder, Data(str(folder), limit=2)).about["fingerprint"]
        != first.about["fingerprint"]
    )
