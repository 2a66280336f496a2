"""Effective robustness by the definition of Taori et al., and one model on several data sets."""

import json

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LinearRegression
from typer.testing import CliRunner

from hfvlm.cli.commands import app
from hfvlm.evaluation.robustness import Fit, fit_line, measure_shift, read_baseline
from hfvlm.evaluation.several import evaluate_several
from hfvlm.evaluation.tasks import Data, evaluate
from hfvlm.samples import scenes

# Accuracies of five models on the original data and on two shifts.
BASELINE = """model,plain,faint,gray
a,0.30,0.18,0.10
b,0.50,0.33,0.21
c,0.62,0.49,
d,0.75,0.60,0.41
e,0.90,0.81,0.66
"""


@pytest.fixture
def baseline(tmp_path):
    path = tmp_path / "baseline.csv"
    path.write_text(BASELINE)
    return path


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """Scenes in folders of their shapes; the same with little contrast; the same in gray, which changes nothing."""
    root = tmp_path_factory.mktemp("shifted")
    for i, kind in enumerate(scenes.all_scenes()):
        image = kind.render(np.random.RandomState(i))
        faint = image.point([int(96 + value * 0.12) for value in range(256)] * 3)
        for name, own in (("plain", image), ("faint", faint), ("gray", image.convert("L").convert("RGB"))):
            (root / name / "test" / kind.shape).mkdir(parents=True, exist_ok=True)
            own.save(root / name / "test" / kind.shape / f"{i}.png")
    return root


def table():
    rows = [line.split(",") for line in BASELINE.splitlines()]
    return {name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])}


def expected_by_scikit_learn(name, accuracy):
    pairs = [(float(a), float(b)) for a, b in zip(table()["plain"], table()[name], strict=True) if b]
    x, y = logit(np.array(pairs)).T
    line = LinearRegression().fit(x[:, None], y)
    return float(expit(line.predict([[logit(accuracy)]])[0])), len(pairs)


def test_the_baseline_is_a_line_between_logits(baseline):
    fits = read_baseline(baseline, "plain", ["faint", "gray"])
    for name, fit in fits.items():
        for accuracy in (0.2, 0.6, 0.95):
            expected, models = expected_by_scikit_learn(name, accuracy)
            assert fit.expected(accuracy) == pytest.approx(expected)
            assert fit.models == models
    assert fit_line([(0.2, 0.1), (0.8, 0.5)]).expected(0.8) == pytest.approx(0.5)


def test_accuracies_of_none_and_all_have_limits():
    assert [Fit(2, -1, 3).expected(x) for x in (0.0, 1.0)] == [0, 1]
    assert [Fit(-2, -1, 3).expected(x) for x in (0.0, 1.0)] == [1, 0]
    assert [Fit(0, 0, 3).expected(x) for x in (0.0, 0.5, 1.0)] == [0.5] * 3
    assert Fit(1e6, 0, 2).expected(0.6) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.33", "33", "line 3: an accuracy above 0 and below 1 is needed, not '33'"),
        ("0.33", "1", "line 3: an accuracy above 0 and below 1"),
        ("0.33", "nan", "line 3: an accuracy above 0"),
        ("faint", "feint", "has no column 'faint'; the nearest is 'feint'"),
        ("a,0.30,0.18,0.10\nb,0.50,0.33,0.21\nc,0.62,0.49,\nd,0.75,0.60,0.41\n", "", "needs 2 models or more"),
    ],
)
def test_wrong_baselines_are_refused(baseline, old, new, message):
    baseline.write_text(BASELINE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_baseline(baseline, "plain", ["faint"])
    with pytest.raises(FileNotFoundError, match="no such baseline"):
        read_baseline(baseline.parent / "other.csv", "plain", ["faint"])


def test_the_interval_is_of_both_data_sets():
    """By the normal approximation, as the rows of either set are independent."""
    random = np.random.RandomState(0)
    one, two = (random.rand(1000) < 0.8).astype(float), (random.rand(500) < 0.6).astype(float)
    shift = measure_shift("x", one, two, Fit(1.0, -0.5, 9))
    value, low, high = shift.drop
    assert value == pytest.approx(two.mean() - one.mean())
    width = 1.96 * (one.var() / 1000 + two.var() / 500) ** 0.5
    assert (low, high) == (pytest.approx(value - width, abs=0.01), pytest.approx(value + width, abs=0.01))
    assert shift.robustness[0] == pytest.approx(two.mean() - expit(logit(one.mean()) - 0.5))
    assert shift.robustness[1] < shift.robustness[0] < shift.robustness[2]


def test_several_data_sets_are_in_one_table(clip_folder, shifted, baseline, tmp_path):
    names = ("plain", "faint", "gray")
    command = [
        "eval",
        str(clip_folder),
        "--task",
        "zero-shot",
        "--baseline",
        str(baseline),
        "-o",
        str(tmp_path / "all"),
    ]
    command += [argument for name in names for argument in ("--data", str(shifted / name))]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "all" / "report.json").read_text())
    accuracy = {name: report["results"][0]["value"] for name, report in written["reports"].items()}
    alone = evaluate("zero-shot", clip_folder, Data(str(shifted / "faint")))
    assert accuracy["faint"] == alone.results[0].value
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["metric", *names]
    assert lines[2].split() == ["accuracy", *(part for n in names for part in (f"{accuracy[n]:.4f}", "(48)"))]
    assert list(written["reports"]) == list(names)
    for shift in written["shifts"]:
        expected, models = expected_by_scikit_learn(shift["name"], accuracy["plain"])
        assert shift["robustness"][0] == pytest.approx(accuracy[shift["name"]] - expected)
        assert shift["drop"][0] == pytest.approx(accuracy[shift["name"]] - accuracy["plain"])
        assert shift["models"] == models
        assert f"{shift['robustness'][0]:+.4f}" in next(line for line in lines if line.startswith(f"{shift['name']} "))
    assert accuracy["faint"] < accuracy["plain"]
    page = (tmp_path / "all" / "report.html").read_text()
    assert "effective robustness" in page
    assert all(report["about"]["fingerprint"] in page for report in written["reports"].values())


def test_without_a_baseline_there_is_only_the_drop(clip_folder, shifted):
    data = {name: Data(str(shifted / name), limit=12) for name in ("plain", "faint")}
    found = evaluate_several("zero-shot", clip_folder, data)
    (shift,) = found.shifts
    assert shift.robustness is None
    assert found.tables[1].rows[0][2] == "needs a baseline"
    cards = found.for_card()
    assert {row["dataset"] for row in cards} == {"plain", "faint"}
    with pytest.raises(ValueError, match="Several data sets are needed, not 1"):
        evaluate_several("zero-shot", clip_folder, {"plain": data["plain"]})
    with pytest.raises(ValueError, match="one classifier of all data sets, not with retrieval"):
        evaluate_several("retrieval", clip_folder, data, baseline="x.csv")
