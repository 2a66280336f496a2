"""BLIP's loop, on small models that learned nothing: what is trained on, and what the next round begins with."""

import json

import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from hfvlm.cli.commands import app
from hfvlm.data.bootstrapping import bootstrap
from hfvlm.media.rows import load_rows
from hfvlm.samples.noisy_pairs import noisy_pairs, write_pairs

RECIPE = """
task: captions
max_steps: 1
per_device_train_batch_size: 4
learning_rate: 1.0e-2
save_strategy: "no"
report_to: none
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("web") / "rows", noisy_pairs(10, {"damaged": 0.2}, seed=0))


@pytest.fixture(scope="module")
def models(small_blip):
    return small_blip("HfvlmBLIPForConditionalGeneration"), small_blip("HfvlmBLIPForImageTextRetrieval")


def test_each_round_trains_on_what_the_last_models_kept(folder, models, tmp_path):
    trained = []

    def train(model, pairs, output):
        trained.append((model, len(load_rows(str(pairs), split="train"))))
        output.symlink_to(model.resolve())

    output = tmp_path / "out"
    reports = bootstrap(folder, output, *models, {"captioner": train}, rounds=2, threshold=0.0, batch_size=4)
    assert [model for model, _ in trained] == [models[0], output / "round-1" / "captioner"]
    for number, report in enumerate(reports, start=1):
        captions = parquet.read_table(output / f"round-{number}" / "captions" / "captions-00000.parquet").to_pylist()
        pairs = load_rows(str(output / f"round-{number}" / "pairs"), split="train")
        assert pairs["text"] == [[row["given"], row["written"]] for row in captions]
        assert report.dropped == {"unreadable": 10 - len(captions)}
        assert report.details["written texts kept"] == report.details["given texts"] == len(captions)
    bootstrap(folder, output, *models, {"captioner": train}, rounds=2, threshold=0.0, batch_size=4)
    assert len(trained) == 2  # all is there
    with pytest.raises(ValueError, match="begun with another threshold"):
        bootstrap(folder, output, *models, {"captioner": train}, rounds=2, threshold=0.5, batch_size=4)


def test_rows_without_a_match_are_dropped(folder, models, tmp_path):
    (report,) = bootstrap(folder, tmp_path / "out", *models, {}, threshold=1.0)
    assert report.kept == 0
    assert set(report.dropped) == {"unreadable", "no-match"}


@pytest.mark.integration
def test_the_command_trains_by_recipes(folder, models, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = ["data", "capfilt", str(folder), "-o", str(tmp_path / "out"), "--captioner", str(models[0])]
    command += ["--judge", str(models[1]), "--captioner-recipe", str(tmp_path / "recipe.yaml"), "--threshold", "0"]
    result = CliRunner().invoke(app, [*command, "--rounds", "2", "--json"])
    assert result.exit_code == 0, result.output
    reports = json.loads(result.stdout[result.stdout.index("[") :])
    assert len(reports) == 2
    assert (tmp_path / "out" / "round-2" / "captioner" / "config.json").exists()
    files = (tmp_path / "out" / f"round-{n}" / "captions" / "captions-00000.parquet" for n in (1, 2))
    texts = [[row["written"] for row in parquet.read_table(file).to_pylist()] for file in files]
    assert texts[0] != texts[1]  # the second round is written by another model
