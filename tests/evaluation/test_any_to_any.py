"""Every modality found by every other one, and classified, on events that the shipped ImageBind has not seen."""

import json
import re
import shlex
from importlib.resources import files
from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from transformers import AutoModel
from typer.testing import CliRunner

import hfvlm
from hfvlm.cli.commands import app
from hfvlm.conversion.languagebind import processor_for
from hfvlm.evaluation.tasks import Data, evaluate
from hfvlm.samples.events import EVENTS, write_events
from tests.support.paths import ROOT

SMALL = files("hfvlm.samples") / "imagebind-tiny"
OPTIONS = {"imu": {"sampling_rate": 200}}
MODALITIES = ("image", "video", "text", "audio", "depth", "thermal", "imu")


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """Two perceptions of each of the 24 events."""
    return write_events(tmp_path_factory.mktemp("events") / "test", [2000, 2001]).parent


@pytest.fixture(scope="module")
def vectors(events):
    """What the shipped model makes of them, by modality."""
    rows = [json.loads(line) for line in (events / "test" / "metadata.jsonl").read_text().splitlines()]
    embedder = hfvlm.Embedder.from_pretrained(SMALL, dtype="float32", device="cpu")
    columns = {m: [str(events / "test" / row[f"{m}_file_name"]) for row in rows] for m in MODALITIES if m != "text"}
    return embedder.encode(**columns, text=[row["text"] for row in rows], options=OPTIONS)


def value(report, metric):
    return next(result for result in report.results if result.metric == metric)


def test_recall_of_every_pair_equals_that_by_hand(events, vectors):
    report = evaluate(
        "any-to-any", SMALL, Data(str(events), source_options=OPTIONS), positives="label", dtype="float32"
    )
    kinds = np.arange(2 * len(EVENTS)) % len(EVENTS)
    for a, b in permutations(MODALITIES, 2):
        scores, same = vectors[a] @ vectors[b].T, kinds[:, None] == kinds
        above = np.array([(row >= row[own].max()) & ~own for row, own in zip(scores, same, strict=True)])
        found = value(report, f"{a} to {b} recall@1")
        assert found.value == pytest.approx((above.sum(axis=1) < 1).mean())
        assert found.n == 48
        assert found.low <= found.value <= found.high
    ones = {r.metric: r.value for r in report.results if "to" in r.metric and r.metric.endswith("@1")}
    assert len(ones) == 42
    assert value(report, "mean recall@1").value == pytest.approx(np.mean(list(ones.values())))
    without = [v for name, v in ones.items() if not {"image", "video"} & set(name.split())]
    assert value(report, "mean recall@1, pairs without image or video").value == pytest.approx(np.mean(without))
    assert set(report.about["chance of recall@1"].values()) == {round(1 / 24, 4)}
    assert value(report, "image to text recall@1").value > 8 / 24
    assert value(report, "audio to depth recall@1").value > 4 / 24
    assert report.about["rows with"] == dict.fromkeys(report.about["rows with"], 48)


@pytest.fixture(scope="module")
def incomplete(events, tmp_path_factory):
    """One perception of each event; ten rows have no audio, eight no depth, one image is damaged."""
    folder = write_events(tmp_path_factory.mktemp("incomplete") / "test", [2002])
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"audio_file_name": None} if i < 10 else {}
        row |= {"depth_file_name": None} if 6 <= i < 14 else {}
    (folder / rows[20]["image_file_name"]).write_bytes(b"no image")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder.parent


def test_each_pair_has_the_rows_that_have_both(incomplete):
    data, modalities = Data(str(incomplete)), ("audio", "depth", "image", "text")
    report = evaluate("any-to-any", SMALL, data, between=modalities, dtype="float32")
    counts = {"audio": range(10, 24), "depth": [*range(6), *range(14, 24)], "image": [i for i in range(24) if i != 20]}
    for a, b in permutations(modalities, 2):
        both = set(counts.get(a, range(24))) & set(counts.get(b, range(24)))
        assert value(report, f"{a} to {b} recall@1").n == len(both)
        assert set(report.each[f"{a} to {b} recall@1"]) == both
        assert report.about["chance of recall@1"][f"{a} to {b}"] == round(1 / len(both), 4)
    assert list(report.errors) == [20]
    assert report.errors[20].startswith("image: ")
    assert report.rows == 24
    strict = evaluate("retrieval", SMALL, data, between=["audio", "depth"], dtype="float32")
    assert strict.rows == len(set(counts["audio"]) & set(counts["depth"]))


@pytest.mark.parametrize(
    ("task", "options", "given", "message"),
    [
        ("any-to-any", {"between": ["audio", "text"]}, OPTIONS, "source_options are given for imu; what is measured"),
        ("any-to-any", {"positives": "place"}, {}, "has no column for place"),
        ("clip-score", {}, OPTIONS, "source_options go with zero-shot"),
        (
            "zero-shot",
            {"modality": "audio"},
            OPTIONS,
            "source_options are given for imu; what is measured here: audio",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(incomplete, task, options, given, message):
    with pytest.raises(ValueError, match=message):
        evaluate(task, SMALL, Data(str(incomplete), source_options=given), **options)


def test_pairs_that_no_two_rows_have_are_left_out(incomplete, tmp_path):
    source = incomplete / "test"
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    folder = tmp_path / "test"
    folder.mkdir()
    kept = [
        {
            "audio": str(source / row["audio_file_name"]) if i % 2 else None,
            "text": row["text"] if i % 2 else None,
            "thermal": None if i % 2 else str(source / row["thermal_file_name"]),
        }
        for i, row in enumerate(rows[10:20])
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, kept)))
    report = evaluate("any-to-any", SMALL, Data(str(tmp_path)), dtype="float32")
    names = {result.metric.rpartition(" ")[0] for result in report.results if " to " in result.metric}
    assert names == {"audio to text", "text to audio"}
    assert report.tables[0].rows[0][1:].count("-") == 2
    for row in kept:
        row["text"] = None
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, kept)))
    with pytest.raises(ValueError, match="no two rows have two of text, audio, thermal in common"):
        evaluate("any-to-any", SMALL, Data(str(tmp_path)), dtype="float32")


@pytest.mark.parametrize("modality", ["audio", "video", "depth", "thermal", "imu"])
def test_every_modality_is_classified_by_names(events, vectors, modality):
    options = {"imu": OPTIONS["imu"]} if modality == "imu" else {}
    data = Data(str(events), source_options=options)
    report = evaluate("zero-shot", SMALL, data, modality=modality, templates="a {}", dtype="float32")
    names = sorted({" ".join(event) for event in EVENTS})
    embedder = hfvlm.Embedder.from_pretrained(SMALL, ["text"], dtype="float32", device="cpu")
    classes = embedder.encode(text=[f"a {name}" for name in names])
    truth = [names.index(" ".join(event)) for event in EVENTS] * 2
    expected = accuracy_score(truth, (vectors[modality] @ classes.T).argmax(axis=1))
    assert value(report, "accuracy").value == pytest.approx(expected)
    assert expected > 4 / 24
    assert value(report, "mean-per-class accuracy").value == pytest.approx(expected)  # each class has two rows
    assert value(report, "accuracy@5").value >= expected


def test_languagebind_is_measured_alike(events, tmp_path):
    """One that learned nothing, in the modalities that it has."""
    preset = hfvlm.load_preset("languagebind/tiny")
    config = preset.make_config()
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    vocabulary = files("hfvlm.samples") / "clip-tiny" / "bpe_simple_vocab.txt.gz"
    processor_for(config, preset.processor, vocabulary).save_pretrained(tmp_path)
    report = evaluate("any-to-any", tmp_path, Data(str(events), limit=6), device="cpu")
    found = {result.metric.split(" to ")[0] for result in report.results if " to " in result.metric}
    assert found == set(MODALITIES) - {"imu"}
    assert {result.n for result in report.results if " to " in result.metric} == {6}
    assert any(result.metric == "mean recall@1, pairs without text" for result in report.results)


def test_the_command_prints_tables_and_writes_a_page(events, tmp_path):
    command = ["eval", str(SMALL), "--task", "any-to-any", "--data", str(events), "--between", "audio,imu,text"]
    command += ["--option", "imu.sampling_rate=200", "--positives", "label", "--dtype", "float32"]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "report")])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"query +audio +imu +text", next(line for line in lines if line.startswith("query")))
    assert re.search(r"^imu +0\.\d{3} \(48\) +- +0\.\d{3} \(48\)$", result.stdout, re.MULTILINE)
    assert not [line for line in lines if line.startswith("audio to text recall@1:")]
    assert any(line.startswith("mean recall@1: 0.") and line.endswith(", n = 6") for line in lines)
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["about"]["dtype"] == "float32"
    assert written["about"]["device"] == "cpu"
    assert re.fullmatch("sha256:[0-9a-f]{64}", written["about"]["fingerprint"])
    assert {"hfvlm", "torch", "transformers", "python"} <= written["versions"].keys()
    assert {result["n"] for result in written["results"]} == {48, 6}
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<h2>recall@1 (queries)</h2>" in page
    assert "data:image/png;base64" in page
    result = CliRunner().invoke(app, [*command[:-6], "--option", "imu.colour=red"])
    assert result.exit_code == 2, result.output
    assert "colour" in result.output


@pytest.mark.integration  # 120 rows in seven modalities take a while
def test_the_page_of_the_documentation_has_the_commands_numbers(tmp_path, monkeypatch):
    """But for one query in a hundred, which other machines may round otherwise."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    command, printed = re.search(
        r"```console\nhfvlm (eval imagebind-tiny --task any-to-any[^`]*?)\n```\n.*?```text\n(.*?)```", text, re.DOTALL
    ).groups()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagebind-tiny").symlink_to(SMALL)
    write_events("events/test", range(1000, 1005))
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    found = result.stdout.splitlines()
    first = [*found[:9], *(line for line in found if line.startswith("mean"))]
    numbers = [np.array(re.findall(r"\d+\.\d{3,4}", part), float) for part in (printed, "\n".join(first))]
    assert len(numbers[0]) == 42 + 3
    np.testing.assert_allclose(numbers[0], numbers[1], atol=0.01)
