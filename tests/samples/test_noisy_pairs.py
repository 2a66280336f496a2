"""Noisy pairs: each kind of noise is what it says."""

import io
import json

import pytest
from PIL import Image, UnidentifiedImageError

from hfvlm.samples.noisy_pairs import NOISE, noisy_pairs, write_pairs
from hfvlm.samples.scenes import TEMPLATES


def right(pair):
    return pair.text in {pair.scene.caption(template) for template in TEMPLATES}


def test_kinds_come_in_their_shares_and_are_what_they_say():
    pairs = list(noisy_pairs(900, dict.fromkeys(NOISE, 0.1), seed=1))
    by_kind = {kind: [pair for pair in pairs if pair.noise == kind] for kind in ["", *NOISE]}
    assert all(60 <= len(found) <= 130 for found in by_kind.values())
    assert all(map(right, by_kind[""] + by_kind["duplicate"] + by_kind["tiny"] + by_kind["elongated"]))
    assert not any(map(right, by_kind["wrong"] + by_kind["boilerplate"] + by_kind["gibberish"] + by_kind["short"]))
    assert len({pair.text for pair in by_kind["boilerplate"]}) <= 4
    assert all(len(pair.text.split()) > 20 for pair in by_kind["long"])
    sizes = {
        kind: {Image.open(io.BytesIO(pair.data)).size for pair in by_kind[kind]} for kind in ("tiny", "elongated")
    }
    assert sizes == {"tiny": {(8, 8)}, "elongated": {(32, 10)}}
    with pytest.raises((UnidentifiedImageError, OSError)):
        Image.open(io.BytesIO(by_kind["damaged"][0].data)).load()


def test_a_skewed_set_has_few_scenes_often():
    counts = {}
    for pair in noisy_pairs(400, skew=2.0, seed=0):
        counts[pair.scene] = counts.get(pair.scene, 0) + 1
    assert max(counts.values()) > 180
    assert sum(count < 5 for count in counts.values()) > 10


def test_they_are_the_same_for_the_same_seed(tmp_path):
    one, other, third = (list(noisy_pairs(20, {"wrong": 0.5}, seed=seed)) for seed in (0, 0, 1))
    assert one == other != third
    write_pairs(tmp_path / "rows", iter(one))
    rows = [json.loads(line) for line in (tmp_path / "rows" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [pair.text for pair in one]
    assert (tmp_path / "rows" / rows[0]["file_name"]).read_bytes() == one[0].data
    with pytest.raises(FileExistsError):
        write_pairs(tmp_path / "rows", iter(one))


def test_unknown_noise_is_refused():
    with pytest.raises(ValueError, match="noise 'blur' is none of wrong, boilerplate"):
        next(noisy_pairs(1, {"blur": 0.5}))
    with pytest.raises(ValueError, match="from 0 to 1 in all, not 1.5"):
        next(noisy_pairs(1, {"wrong": 1.5}))
