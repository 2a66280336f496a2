"""Near duplicates: found, by few comparisons, and reported with what they do to accuracies."""

import json

import numpy as np
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from hfvlm.cli.commands import app
from hfvlm.data.dedupe import Dedupe, dedupe
from hfvlm.data.hashes import HASH_BYTES, describe
from hfvlm.data.near import Embedded, Near, Perceptual, bands_for
from hfvlm.data.overlap import compared
from hfvlm.data.store import Store
from hfvlm.evaluation.report import Report
from hfvlm.inference.embedder import Embedder
from hfvlm.samples.noisy_pairs import noisy_pairs, write_pairs
from hfvlm.samples.scenes import all_scenes

NOISE = {"duplicate": 0.4}


@pytest.fixture(scope="module")
def pairs():
    return list(noisy_pairs(120, NOISE, seed=2))


@pytest.fixture(scope="module")
def folder(pairs, tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("copies") / "rows", iter(pairs))


@pytest.fixture(scope="module")
def tests(pairs, tmp_path_factory):
    """Six rows that are trained on and six that are not."""
    new = noisy_pairs(6, seed=77)
    return write_pairs(tmp_path_factory.mktemp("tests") / "test", iter([*pairs[:6], *new])).parent


def dropped(output):
    return parquet.read_table(output / "dropped-00000.parquet").to_pylist()


def test_copies_are_dropped_and_the_first_of_each_stays(pairs, folder, tmp_path, written):
    report = dedupe(folder, tmp_path / "out", Perceptual(distance=6))
    copies = [i for i, pair in enumerate(pairs) if pair.noise == "duplicate"]
    assert [row["row"] for row in dropped(tmp_path / "out")] == copies
    assert report.dropped == {"duplicate": len(copies)}
    assert [row["noise"] for row in written(tmp_path / "out")] == [""] * (len(pairs) - len(copies))
    for row in dropped(tmp_path / "out"):
        original = int(row["note"].split()[1].rstrip(","))
        assert pairs[original].scene == pairs[row["row"]].scene


def noise_descriptors(count, random):
    """Descriptors of images that have nothing in common."""
    return [random.bytes(HASH_BYTES) + bytes(random.integers(0, 256, 48, np.uint8)) for _ in range(count)]


def changed(descriptor, bits, random):
    """A descriptor of which so many bits are flipped."""
    number = int.from_bytes(descriptor[:HASH_BYTES], "big")
    for bit in random.permutation(8 * HASH_BYTES)[:bits]:
        number ^= 1 << int(bit)
    return number.to_bytes(HASH_BYTES, "big") + descriptor[HASH_BYTES:]


def comparisons(count, path, recall=None):
    """Index so many descriptors, each looked up before it is added, and count the pairs that are compared."""
    random = np.random.default_rng(0)
    descriptors = noise_descriptors(count, random)
    with Store(path) as store:
        near = Near(store, Perceptual())
        rows = list(enumerate(descriptors))
        store.connection.executemany("INSERT INTO described VALUES (0, ?, ?)", rows)
        near.prepare()
        found = 0
        with store.step("all", 0):
            for number, descriptor in rows:
                assert not list(near.hits(0, descriptor))
                near.add(0, number, descriptor)
        compared_pairs = near.comparisons
        if recall is not None:
            copies = [changed(descriptor, near.likeness.distance, random) for descriptor in descriptors[:recall]]
            found = sum(any(hit.row == i for hit in near.hits(0, copy)) for i, copy in enumerate(copies))
    return compared_pairs, found


def test_comparisons_grow_with_the_rows_and_not_with_their_pairs(tmp_path):
    counts = {n: comparisons(n, tmp_path / f"{n}.sqlite")[0] for n in (500, 2000)}
    assert counts[2000] < 6 * counts[500]  # 16 times as many pairs
    assert counts[2000] < 0.02 * 2000 * 1999 / 2
    width, bands = bands_for(10**9, 64, Perceptual().flips)
    assert bands * 10**9 / 2**width < 2 * bands  # rows that share a band by chance: no more than bands


def test_copies_at_the_threshold_share_a_band(tmp_path):
    _, found = comparisons(500, tmp_path / "a.sqlite", recall=200)
    assert found >= 192


@pytest.mark.integration
def test_a_run_that_was_killed_continues(folder, tmp_path, monkeypatch, content):
    expected = dedupe(folder, tmp_path / "whole", shard_rows=40)
    original, calls = Dedupe.decide, []

    def killed(self, *arguments):
        for decision in original(self, *arguments):
            calls.append(1)
            if len(calls) == 60:
                raise KeyboardInterrupt
            yield decision

    with monkeypatch.context() as patched:
        patched.setattr(Dedupe, "decide", killed)
        with pytest.raises(KeyboardInterrupt):
            dedupe(folder, tmp_path / "part", shard_rows=40)
    assert dedupe(folder, tmp_path / "part", shard_rows=40) == expected
    assert content(tmp_path / "part") == content(tmp_path / "whole")


def test_overlap_with_test_sets_and_what_it_changes(folder, tests, pairs, tmp_path):
    right = np.array([1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 1.0])
    evaluation = Report("zero-shot", "clip", str(tests), 12, about={"limit": None})
    evaluation.add("accuracy", list(range(12)), right)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "report.json").write_text(json.dumps(evaluation.as_json()))
    command = ["data", "dedupe", str(folder), "-o", str(tmp_path / "out"), "--test", f"shapes={tests}"]
    result = CliRunner().invoke(app, [*command, "--evaluation", f"shapes={tmp_path / 'evaluation'}", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["details"]["overlap with test sets"] == [{"set": "shapes", "rows": 12, "overlap": 6, "share": 0.5}]
    found = parquet.read_table(tmp_path / "out" / "overlap.parquet").to_pylist()
    assert {row["test_row"] for row in found} == set(range(6))
    assert {row["row"] for row in found if row["test_row"] == 3} >= {3}
    assert report["dropped"]["test-duplicate"] == len({row["row"] for row in found})
    rows = {row["split"]: row for row in report["details"]["accuracy on overlap and clean"]}
    assert {split: (row["rows"], round(row["accuracy"], 4)) for split, row in rows.items()} == {
        "all": (12, 0.5833), "clean": (6, 0.3333), "overlap": (6, 0.8333),
    }  # fmt: skip
    # The sum of the binomial's tail: 5 and 6 of 6 at a third.
    assert rows["overlap"]["p"] == pytest.approx(6 * (1 / 3) ** 5 * (2 / 3) + (1 / 3) ** 6)


def test_the_interval_of_overlap_is_clopper_and_pearsons():
    (_, _, overlap) = compared("a", dict.fromkeys(range(10), 1.0) | {10: 0.0}, set(range(10)))
    # Of ten right ones of ten the lower bound is 0.0025 ** (1 / 10).
    assert overlap["interval"] == f"{0.0025**0.1:.4f} to 1.0000"
    assert overlap["p"] == pytest.approx(0)
    assert compared("a", {0: 1.0}, {0})[1]["accuracy"] == ""  # no clean row


def test_vectors_of_a_model_find_copies_too(folder, pairs, clip_folder, tmp_path):
    likeness = Embedded(Embedder.from_pretrained(clip_folder, ["image"]), 0.995)
    report = dedupe(folder, tmp_path / "out", likeness)
    copies = {i for i, pair in enumerate(pairs) if pair.noise == "duplicate"}
    found = {row["row"] for row in dropped(tmp_path / "out")}
    assert len(found & copies) >= 0.9 * len(copies)
    vectors = likeness.embedder.encode(image=[str(p) for p in sorted(folder.glob("0*"))])
    near = (np.tril(vectors @ vectors.T, -1) >= 0.995).any(axis=1)
    assert found <= set(np.flatnonzero(near).tolist())
    assert report.settings["tests"]["likeness"]["threshold"] == 0.995


def test_descriptors_see_colours_and_survive_compression():
    random = np.random.RandomState(0)
    red, blue = (
        next(s for s in all_scenes() if s.colour == c).render(np.random.RandomState(4)) for c in ("red", "blue")
    )
    assert not Perceptual().compare(describe(red), describe(blue))[0]
    assert Perceptual().compare(describe(red), describe(red.resize((57, 57))))[0]
    others = [scene.render(random) for scene in all_scenes()]
    same = [Perceptual().compare(describe(red), describe(other))[0] for other in others]
    assert not any(same)


def test_what_cannot_be_is_refused(folder, tests, tmp_path):
    with pytest.raises(ValueError, match="evaluation 'other': there is no test set of that name; there are shapes"):
        dedupe(folder, tmp_path / "out", tests={"shapes": str(tests)}, evaluations={"other": tmp_path})
    with pytest.raises(ValueError, match="distance must be an integer from 0 to 16"):
        Perceptual(distance=100)
