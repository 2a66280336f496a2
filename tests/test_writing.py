"""Outputs that appear whole or not at all, whenever the process is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from hfvlm import writing
from hfvlm.writing import new_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def made(folder, content="new", **options):
    with new_folder(folder, **options) as target:
        (target / "a.txt").write_text(content)
    return folder


def content(folder):
    return (folder / "a.txt").read_text()


@pytest.fixture(params=["at once", "in two steps"])
def way(request, monkeypatch):
    if request.param == "in two steps":
        monkeypatch.setattr(writing, "_exchanged", lambda *_: False)
    return request.param


@pytest.mark.usefixtures("way")
def test_an_output_is_replaced(tmp_path):
    made(tmp_path / "out", "old")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        made(tmp_path / "out")
    assert content(made(tmp_path / "out", overwrite=True)) == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.usefixtures("way")
def test_a_file_is_replaced(tmp_path):
    (tmp_path / "out").write_text("old")
    assert content(made(tmp_path / "out", overwrite=True)) == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.usefixtures("way")
def test_what_a_link_points_to_is_replaced(tmp_path):
    made(tmp_path / "disk" / "models", "old")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "models")
    with pytest.raises(FileExistsError, match="out exists already"):
        made(tmp_path / "out")
    made(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert content(tmp_path / "disk" / "models") == "new"
    assert names(tmp_path) == ["disk", "out"]
    assert names(tmp_path / "disk") == ["models"]


def test_a_link_to_nothing_is_filled(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "models")
    assert content(made(tmp_path / "out")) == "new"
    assert content(tmp_path / "disk" / "models") == "new"


@pytest.mark.parametrize("step", range(6))
def test_interrupted_in_two_steps(tmp_path, monkeypatch, step):
    """Whatever call is the last, the old output or the new one is there after the next run begins."""
    monkeypatch.setattr(writing, "_exchanged", lambda *_: False)
    made(tmp_path / "out", "old")
    calls = iter(range(100))

    class Killed(BaseException):
        pass

    def interrupted(real):
        def call(*arguments, **options):
            if next(calls) >= step:
                raise Killed
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        # After the first interruption nothing works any more, as when the process is killed.
        for owner, name in ((writing.Path, "rename"), (writing.shutil, "rmtree")):
            patch.setattr(owner, name, interrupted(getattr(owner, name)))
        with contextlib.suppress(Killed):
            made(tmp_path / "out", overwrite=True)
    with pytest.raises(FileExistsError):
        made(tmp_path / "out")
    assert content(tmp_path / "out") in ("old", "new")
    assert names(tmp_path) == ["out"]


KILLED = """
import os, sys, time
from hfvlm.writing import new_folder
with new_folder(sys.argv[1], overwrite=True) as target:
    (target / "a.txt").write_text("new")
    print(target.name, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_left_is_swept_and_what_a_running_one_writes_is_not(tmp_path):
    output = made(tmp_path / "out", "old")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
        beside = tmp_path / run.stdout.readline().strip()
        made(output, "mine", overwrite=True)
        assert (beside / "a.txt").exists(), "a run at work lost its folder"
        run.send_signal(signal.SIGKILL)
    time.sleep(0.1)
    assert beside.exists()
    (tmp_path / ".out-mine").mkdir()
    made(output, overwrite=True)
    assert names(tmp_path) == [".out-mine", "out"]
