"""ALIGN's filter: each kind of noise is dropped for its own reason, and nothing else is."""

import json
import re
from collections import Counter

import pytest
from typer.testing import CliRunner

from hfvlm.cli.commands import app
from hfvlm.data.filtering import Filter, Thresholds, filter_pairs
from hfvlm.data.rules import RULES
from hfvlm.media.rows import load_rows
from hfvlm.samples.noisy_pairs import noisy_pairs, write_pairs

# Thresholds for images of 32 pixels, and captions of 192 kinds.
SMALL = Thresholds(min_edge=9, max_images=3, min_count=2)
REASONS = {
    "gibberish": "rare-word", "short": "short", "long": "long", "tiny": "small",
    "elongated": "elongated", "damaged": "unreadable",
}  # fmt: skip


@pytest.fixture(scope="module")
def filtered(noisy_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("filtered") / "out"
    return filter_pairs(noisy_folder, output, SMALL, shard_rows=100), output


def test_every_kind_of_noise_is_dropped_for_its_reason(filtered, noisy_rows, content, written):
    report, output = filtered
    dropped = {row["row"]: row for name, rows in content(output).items() if "dropped" in name for row in rows}
    shared = {text for text, n in Counter(row["text"] for row in noisy_rows).items() if n > 3}
    assert any(row["noise"] == "boilerplate" and row["text"] in shared for row in noisy_rows)
    for i, row in enumerate(noisy_rows):
        if row["noise"] in ("", "wrong", "duplicate", "boilerplate"):  # captions that many scenes share look like it
            assert dropped.get(i, {}).get("reasons") == (["boilerplate"] if row["text"] in shared else None), row
        else:
            assert REASONS[row["noise"]] in dropped[i]["reasons"], row
    assert [row["text"] for row in written(output)] == [
        row["text"] for i, row in enumerate(noisy_rows) if i not in dropped
    ]
    assert report.rows == len(noisy_rows)
    assert report.kept == report.written == len(noisy_rows) - sum(report.dropped.values())
    assert sum(report.dropped.values()) == len(dropped)
    assert set(report.dropped) <= set(RULES)


def test_the_report_is_readable_and_its_rows_are_data(filtered, written):
    report, output = filtered
    tables = (output / "report.md").read_text()
    assert tables.startswith(f"# filter: {report.kept} of 240 rows kept")
    assert "| unreadable " in tables
    assert "8 x 8 pixels" in json.dumps(report.examples["small"])
    (example, *_) = report.examples["unreadable"]
    assert re.search(r"\([^/]*\.png", example), f"a path within the data set's folder: {example}"
    rows = load_rows(str(output), split="train")
    assert rows["text"] == [row["text"] for row in written(output)]
    assert not list(output.glob("state*"))
    assert filter_pairs(report.settings["source"], output, SMALL, shard_rows=100) == report  # nothing is left to do


def test_a_run_that_was_killed_three_times_continues(filtered, noisy_folder, tmp_path, monkeypatch, content):
    _, expected = filtered
    for method, call in (("count", 2), ("ended", 1), ("decide", 2)):
        original, calls = getattr(Filter, method), []

        def killed(self, *arguments, original=original, calls=calls, call=call):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(self, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(Filter, method, killed)
            with pytest.raises(KeyboardInterrupt):
                filter_pairs(noisy_folder, tmp_path / "out", SMALL, shard_rows=100)
        assert not (tmp_path / "out" / "report.json").exists()
    filter_pairs(noisy_folder, tmp_path / "out", SMALL, shard_rows=100)
    assert content(tmp_path / "out") == content(expected)
    assert (tmp_path / "out" / "report.json").read_text() == (expected / "report.json").read_text()


def test_rare_tokens_are_those_beyond_the_vocabulary(jsonl, tmp_path, noisy_folder):
    texts = ["one two three"] * 3 + ["one two four"]
    image = str(noisy_folder / "000000.png")
    rows = jsonl([{"image": image, "text": text} for text in texts])
    # one, two and "one two" occur four times, three and "two three" three times, four and "two four" once.
    for vocabulary, kept in ((7, 4), (5, 3), (3, 0)):
        limits = Thresholds(min_edge=1, max_aspect=10, vocabulary=vocabulary)
        report = filter_pairs(rows, tmp_path / str(vocabulary), limits)
        assert report.kept == kept, vocabulary
        assert set(report.dropped) <= {"rare-token"}


def test_images_of_many_texts_and_lists_of_texts(jsonl, tmp_path, noisy_folder, written):
    images = [str(noisy_folder / f"{i:06}.png") for i in range(240) if (noisy_folder / f"{i:06}.png").exists()][:40]
    rows = [{"image": images[0], "text": [f"a thing number {i}"]} for i in range(5)]
    rows += [{"image": image, "text": ["download this image here", "short"]} for image in images[1:4]]
    rows += [{"image": images[4], "text": ["a red circle here", "no"]}, {"image": images[5], "text": []}]
    limits = Thresholds(min_edge=1, max_aspect=10, max_texts=4, max_images=2)
    report = filter_pairs(jsonl(rows), tmp_path / "out", limits)
    assert report.dropped == {"many-texts": 5, "boilerplate": 3, "no-text": 1} or "unreadable" in report.dropped
    assert written(tmp_path / "out")[0]["text"] == ["a red circle here"]


def test_near_duplicates_of_test_images_are_dropped(tmp_path, content):
    pairs = list(noisy_pairs(40, {"duplicate": 0.3}, seed=5))
    first = [pair for pair in pairs if not pair.noise][:12]
    write_pairs(tmp_path / "test" / "test", iter(first[:6]))
    write_pairs(tmp_path / "train", iter(pairs))
    limits = Thresholds(min_edge=1, max_images=1000)
    report = filter_pairs(tmp_path / "train", tmp_path / "out", limits, tests={"shapes": str(tmp_path / "test")})
    scenes = [(pair.scene, pair.text) for pair in first[:6]]
    copies = {
        i for i, pair in enumerate(pairs) if (pair.scene, pair.text) in scenes and (pair.noise or pair in first[:6])
    }
    dropped = {row["row"]: row["note"] for row in content(tmp_path / "out")["dropped-00000.parquet"]}
    assert copies <= set(dropped)
    assert set(report.dropped) == {"test-duplicate"}
    assert dropped[pairs.index(first[2])] == "row 2 of shapes"


def test_the_command(noisy_folder, tmp_path, filtered):
    command = ["data", "filter", str(noisy_folder), "-o", str(tmp_path / "out"), "--min-edge", "9", "--json"]
    result = CliRunner().invoke(app, [*command, "--max-images", "3", "--min-count", "2", "--shard-rows", "100"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["dropped"] == filtered[0].dropped


def test_thresholds_are_checked():
    with pytest.raises(ValueError, match="min_words 30 is more than max_words 20"):
        Thresholds(min_words=30)
    with pytest.raises(ValueError, match="max_aspect must be a finite number above 1"):
        Thresholds(max_aspect=0.5)
