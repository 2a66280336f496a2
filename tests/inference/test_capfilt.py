"""Captions that are written and filtered, on two small BLIPs that learned nothing yet."""

import json

import numpy as np
import pytest
import torch
from pyarrow import parquet
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from hfvlm.cli.commands import app
from hfvlm.inference.capfilt import capfilt
from hfvlm.media.images import read_image
from hfvlm.samples import scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    with (folder / "metadata.jsonl").open("w") as metadata:
        for i, kind in enumerate(scenes.all_scenes()[:14]):
            kind.render(random).save(folder / f"{i:02}.png")
            metadata.write(json.dumps({"file_name": f"{i:02}.png", "text": "a circle" if i % 2 else ""}) + "\n")
    (folder / "03.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def models(small_blip):
    return small_blip("HfvlmBLIPForConditionalGeneration"), small_blip("HfvlmBLIPForImageTextRetrieval")


def run(folder, output, models, **options):
    capfilt(folder, output, *models, batch_size=3, shard_rows=5, **options)
    return {path.name: parquet.read_table(path).to_pylist() for path in sorted(output.glob("*.parquet"))}


def test_texts_are_written_judged_and_kept(folder, models, tmp_path):
    tables = run(folder, tmp_path / "out", models)
    rows = [row for name, table in tables.items() if name.startswith("captions") for row in table]
    errors = [row for name, table in tables.items() if name.startswith("errors") for row in table]
    assert [row["row"] for row in rows] == [i for i in range(14) if i != 3]
    assert [(row["row"], "03.png" in row["error"]) for row in errors] == [(3, True)]
    judge, processor = AutoModel.from_pretrained(models[1]).eval(), AutoProcessor.from_pretrained(models[1])
    for row in rows:
        assert (row["given"], row["given_match"] is None) == (("a circle", False) if row["row"] % 2 else (None, True))
        texts = [text for text in (row["given"], row["written"]) if text]
        inputs = processor(images=[read_image(row["path"])], text=texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            output = judge.get_multimodal_features(**inputs)
            shares = judge.itm_head(output.pooler_output).softmax(-1)[:, 1].tolist()
        expected = dict(zip(texts, shares, strict=True))
        assert row["written_match"] == pytest.approx(expected[row["written"]], abs=1e-5)
        assert row["kept"] == [text for text in texts if expected[text] >= 0.5]
    assert len({row["written"] for row in rows}) > 3


def test_a_run_that_is_started_again_writes_the_same(folder, models, tmp_path):
    expected = run(folder, tmp_path / "whole", models, seed=1)
    first = run(folder, tmp_path / "part", models, seed=1)
    (tmp_path / "part" / "captions-00001.parquet").unlink()
    assert run(folder, tmp_path / "part", models, seed=1) == expected == first
    assert run(folder, tmp_path / "other", models, seed=2) != expected
    with pytest.raises(ValueError, match="begun with another threshold"):
        run(folder, tmp_path / "part", models, seed=1, threshold=0.9)


def test_the_command(folder, models, tmp_path):
    command = ["capfilt", str(folder), "-o", str(tmp_path / "out"), "--captioner", str(models[0])]
    result = CliRunner().invoke(app, [*command, "--judge", str(models[1]), "--threshold", "0"])
    assert result.exit_code == 0, result.output
    rows = parquet.read_table(tmp_path / "out" / "captions-00000.parquet").to_pylist()
    assert all(row["written"] in row["kept"] for row in rows)


def test_a_judge_must_match(folder, models, clip_folder, tmp_path):
    with pytest.raises(ValueError, match="HfvlmCLIPModel cannot match texts with images"):
        capfilt(folder, tmp_path, models[0], clip_folder)
