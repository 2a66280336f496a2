"""What small models learn: the register, the results, and a shortened form of every entry."""

import json
import subprocess
import sys

import numpy as np
import pytest

from learning import results
from learning.__main__ import main
from learning.entries import Entry, Scores, entries, learns
from learning.fitting import count_of
from tests.support.paths import ROOT

ENTRIES = entries()
# Two steps, on a few examples.
SHORT = 0.0005
# Entries that take more than one and a half seconds even so.
LONG = ("dalle_mini", "flamingo", "merlot_reserve", "pg_video_llava", "video_chatgpt")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.trained] * (name in LONG)) for name in ENTRIES]
)
def test_every_entry_trains_and_tests(name):
    scores = ENTRIES[name].run(0, SHORT)
    assert scores
    for measure, (seeing, blind) in scores.items():
        assert seeing.shape == blind.shape, measure
        assert seeing.ndim == 1
        assert len(seeing) >= 1
        for values in (seeing, blind):
            assert np.isfinite(values).all()
            assert values.min() >= 0
            assert values.max() <= 1


def test_a_model_learns_more_than_its_blind_baseline():
    """One, after a tenth of its steps, on all examples; `make learn` trains all."""
    for measure, scores in ENTRIES["filip"].run(0, 0.1).items():
        assert len(scores.seeing) == len(scores.blind) >= 40
        assert scores.seeing.mean() > scores.blind.mean() + 0.15, measure


def test_examples_are_fewer_where_steps_are_few():
    assert [count_of(200, effort) for effort in (1, 0.1, 0.05, 0.001, 0.0001)] == [200, 200, 100, 2, 1]


def test_every_architecture_has_an_entry():
    architectures = {path.parent.name for path in (ROOT / "hfvlm" / "models").glob("*/__init__.py")}
    assert set(ENTRIES) == architectures
    with pytest.raises(ValueError, match="clip has two entries"):
        learns("clip", "", "")(lambda seed, effort: {})


def test_intervals_are_around_the_means():
    seeing, blind = np.array([1.0] * 75 + [0.0] * 25), np.array([1.0] * 10 + [0.0] * 90)
    found = results.measured(Scores(seeing, blind))
    assert (found["examples"], found["seeing"]["mean"], found["blind"]["mean"]) == (100, 0.75, 0.1)
    low, high = found["seeing"]["interval"]
    assert 0.64 < low < 0.70 < 0.80 < high < 0.86
    with pytest.raises(ValueError, match="100 scores of the model, and 3 of the baseline"):
        results.measured(Scores(seeing, blind[:3]))


def test_runs_resume_and_the_page_has_only_what_was_run(tmp_path):
    entry = Entry("clip", "names", "grey", lambda seed, effort: {"named": Scores(np.ones(50), np.zeros(50))})
    stored = {"clip": {"0": results.run(entry, 0)}}
    results.keep(stored, tmp_path / "results.json")
    known = results.read(tmp_path / "results.json")
    assert known == stored
    assert results.missing(known, ["clip", "coca"], [0, 1]) == [("coca", 0), ("clip", 1), ("coca", 1)]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    others = {name: ENTRIES[name] for name in ("clip", "coca")}
    results.write_page(known, others, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| clip | named | 0 | 1.00 (1.00 to 1.00) | 0.00 (0.00 to 0.00) | 50 |" in text
    assert "Not run yet, and so without numbers: coca." in text
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="remove it to begin again"):
        results.read(tmp_path / "results.json")


def test_the_page_is_that_of_the_results(tmp_path):
    page = tmp_path / "learning.md"
    page.write_text(results.PAGE.read_text())
    assert main(["--page", "--write", str(page)]) == 0
    assert page.read_text() == results.PAGE.read_text()
    known = json.loads(results.RESULTS.read_text()) if results.RESULTS.exists() else {}
    assert set(known) <= set(ENTRIES)
    for name, seeds in known.items():
        for seed, found in seeds.items():
            for measure, each in found["measures"].items():
                assert each["seeing"]["mean"] > each["blind"]["mean"], (name, seed, measure)


@pytest.mark.trained  # it starts two interpreters
def test_the_command_starts_processes_and_stops_when_its_time_is_up(tmp_path):
    page = tmp_path / "learning.md"
    page.write_text(f"{results.BEGIN}\n{results.END}\n")
    given = ["clip", "--seeds", "0", "--minutes", "0", "--results", tmp_path / "results.json", "--write", page]
    done = subprocess.run(
        [sys.executable, "-m", "learning", *map(str, given)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "without numbers: align" in page.read_text()


def test_an_unknown_entry_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["clap"])
    assert "no entry clap; there are align" in capsys.readouterr().err
