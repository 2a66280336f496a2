"""Two models side by side, by paired intervals."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModel
from typer.testing import CliRunner

from hfvlm.cli.commands import app
from hfvlm.evaluation.comparison import compare, side_by_side
from hfvlm.evaluation.report import Report
from hfvlm.evaluation.tasks import Data, evaluate
from hfvlm.samples import scenes


def report(model, given, truth, **about):
    """A report of accuracy and precision by its answers, of two rows each."""
    found = Report("hallucination", model, "data", 10, about=about)
    rows = np.repeat(np.arange(len(given) // 2), 2).tolist()
    found.add("accuracy", rows, given == truth)
    found.add_ratio("precision", rows, given & truth, given)
    return found


def test_ratios_are_compared_by_whole_rows():
    random = np.random.RandomState(0)
    truth, one, two = (random.rand(400) < share for share in (0.5, 0.5, 0.5))
    two = np.where(random.rand(400) < 0.4, truth, two)
    accuracy, precision = compare(report("a", one, truth), report("b", two, truth))
    assert precision.first == pytest.approx((one & truth).sum() / one.sum())
    assert precision.second == pytest.approx((two & truth).sum() / two.sum())
    assert (accuracy.rows, precision.rows) == (200, 200)
    # The same bootstrap by hand, with another generator: its bounds are those of the normal approximation.
    rows, gains = np.arange(400).reshape(200, 2), []
    for _ in range(2000):
        drawn = rows[random.randint(200, size=200)].ravel()
        gains.append((two & truth)[drawn].sum() / two[drawn].sum() - (one & truth)[drawn].sum() / one[drawn].sum())
    low, high = np.quantile(gains, [0.025, 0.975])
    assert (precision.low, precision.high) == (pytest.approx(low, abs=0.015), pytest.approx(high, abs=0.015))


def test_pairing_narrows_the_interval():
    """Rows that are hard for both count for neither."""
    random = np.random.RandomState(1)
    hard = random.rand(300) < 0.5
    one = ~hard
    two = one.copy()
    two[np.flatnonzero(hard)[:20]] = True
    truth = np.ones(300, bool)
    found = compare(report("a", one, truth), report("b", two, truth))[0]
    alone = report("a", one, truth).results[0]
    assert found.gain == pytest.approx(20 / 300)
    assert found.high - found.low < alone.high - alone.low
    assert found.low > 0


def test_other_content_is_refused_and_other_paths_are_not():
    truth = np.ones(4, bool)
    one, two = report("a", truth, truth, fingerprint="sha256:1"), report("b", truth, truth, fingerprint="sha256:2")
    with pytest.raises(ValueError, match="another content of the data, data \\(sha256:1\\)"):
        compare(one, two)
    two.about["fingerprint"], two.data = "sha256:1", "moved"
    assert compare(one, two)[0].gain == 0
    del two.about["fingerprint"]
    with pytest.raises(ValueError, match="another data, data and moved"):
        compare(one, two)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    for i, kind in enumerate(scenes.all_scenes()):
        (folder / "test" / kind.shape).mkdir(parents=True, exist_ok=True)
        kind.render(np.random.RandomState(i)).save(folder / "test" / kind.shape / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def untrained(clip_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained") / "model"
    shutil.copytree(clip_folder, folder)
    torch.manual_seed(0)
    AutoModel.from_config(AutoModel.from_pretrained(clip_folder).config).save_pretrained(folder)
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def test_the_command_puts_two_models_side_by_side(clip_folder, untrained, drawn, tmp_path):
    common = ["--task", "zero-shot", "--data", drawn, "--limit", 24]
    printed = run(*common, "--compare", untrained, clip_folder, "-o", tmp_path / "both")
    one, two = (evaluate("zero-shot", folder, Data(str(drawn), limit=24)) for folder in (untrained, clip_folder))
    expected = side_by_side(one, two)
    lines = printed.splitlines()
    assert lines[0] == f"zero-shot on {drawn.name}"
    assert lines[1].split() == ["metric", "model", "clip-tiny", "difference", "95", "%", "interval", "rows"]
    for difference, line in zip(expected.differences, lines[2:], strict=False):
        assert line.startswith(difference.metric)
        assert f"{difference.first:.4f}" in line
        assert f"{difference.gain:+.4f}" in line
        assert difference.interval in line
    assert [d.metric for d in expected.differences] == ["accuracy", "accuracy@5", "mean-per-class accuracy"]
    assert expected.differences[2].interval == "no interval"
    written = json.loads((tmp_path / "both" / "report.json").read_text())
    assert written["models"] == [str(untrained), str(clip_folder)]
    assert written["differences"][0]["gain"] == pytest.approx(expected.differences[0].gain, abs=1e-5)
    page = (tmp_path / "both" / "report.html").read_text()
    assert "no interval" in page
    assert two.about["fingerprint"] in page
    for name, report in (("a", one), ("b", two)):
        (tmp_path / name).mkdir()
        report.write(tmp_path / name)
    assert run("--compare", tmp_path / "a", tmp_path / "b").splitlines()[2:] == lines[2:]
    mixed = json.loads(run("--compare", tmp_path / "a", clip_folder, *common, "--json"))
    assert mixed["differences"] == written["differences"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "zero-shot", "--data", "."], "name a model's folder"),
        (["MODEL", "--compare", "MODEL", "MODEL"], "give both to it"),
        (["--compare", "MODEL", "MODEL", "--card"], "goes with one model"),
        (["--compare", "MODEL", "nothing"], "no such model or report"),
        (["--compare", "MODEL", "MODEL"], "needed to evaluate"),
        (["--compare", "MODEL", "MODEL", "--data", "a", "--data", "b"], "goes with one --data"),
        (["MODEL", "--task", "zero-shot"], "needed to evaluate"),
        (["MODEL", "--task", "zero-shot", "--data", "x/a", "--data", "y/a"], "two are called a"),
        (["MODEL", "--task", "retrieval", "--data", "x", "--prompts", "mnist"], "goes with --task zero-shot only"),
        (["MODEL", "--task", "zero-shot", "--data", "x", "--baseline", "x.csv"], "--data twice or more"),
    ],
)
def test_options_that_exclude_each_other_are_refused(arguments, message, clip_folder):
    assert message in " ".join(run(*[{"MODEL": clip_folder}.get(a, a) for a in arguments], code=2).split())
