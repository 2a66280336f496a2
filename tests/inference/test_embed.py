"""`hfvlm embed` and `hfvlm search` on folders, tars and Parquet."""

import io
import json
import os
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from pyarrow import parquet
from transformers import AutoModel
from typer.testing import CliRunner

import hfvlm
from hfvlm.cli.commands import app
from hfvlm.inference.embed import count_rows, embed, read_captions, read_embedder, read_vectors
from hfvlm.inference.embedder import Embedder
from hfvlm.inference.search import weighed
from hfvlm.inference.stores import DatabaseStore
from hfvlm.media.rows import load_rows
from hfvlm.samples import scenes
from tests.support.processes import forks

KINDS = scenes.all_scenes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 images with captions, of which two are damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    with (folder / "metadata.jsonl").open("w") as metadata:
        for i, kind in enumerate(KINDS):
            kind.render(random).save(folder / f"{i:02}.png")
            metadata.write(json.dumps({"file_name": f"{i:02}.png", "captions": [kind.caption(), "other"]}) + "\n")
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:60])
    (folder / "40.png").write_bytes(b"")
    return folder


def read(output):
    names = sorted(path.name for path in output.iterdir() if path.suffix == ".parquet")
    return {name: parquet.read_table(output / name) for name in names}


@pytest.fixture(scope="module")
def embedded(folder, clip_folder, tmp_path_factory):
    return embed(folder, tmp_path_factory.mktemp("embedded"), clip_folder, batch_size=8, shard_rows=20)


def test_every_row_is_embedded_or_an_error(embedded, folder, clip_folder):
    tables = read(embedded)
    assert list(tables) == [f"errors-{i:05}.parquet" for i in (0, 2)] + [f"vectors-{i:05}.parquet" for i in range(3)]
    rows = [row for name, table in tables.items() if name.startswith("vectors") for row in table["row"].to_pylist()]
    assert rows == [i for i in range(48) if i not in (5, 40)]
    errors = [row for name, table in tables.items() if name.startswith("errors") for row in table.to_pylist()]
    assert [(row["row"], row["modality"]) for row in errors] == [(5, "image"), (40, "image")]
    assert "05.png: damaged or truncated" in errors[0]["error"]
    embedder = hfvlm.Embedder.from_pretrained(clip_folder)
    images, paths = read_vectors(embedded, "image")
    name, score = images.search(embedder.encode(image=str(folder / "07.png")), 1)[0]
    assert score == pytest.approx(1, abs=1e-5)
    assert paths[name].endswith("07.png")
    texts, _ = read_vectors(embedded, "text")
    np.testing.assert_allclose(texts.vectors[3], embedder.encode(text=KINDS[3].caption()), atol=1e-5)
    with pytest.raises(ValueError, match="vectors of image, text, not of audio"):
        read_vectors(embedded, "audio")


def embed_slowly(folder, output, model):
    features = Embedder.features
    Embedder.features = lambda *args: (time.sleep(0.2), features(*args))[1]
    embed(folder, output, model, batch_size=8, shard_rows=20)


def test_a_killed_run_goes_on_where_it_was(embedded, folder, clip_folder, tmp_path):
    process = forks.Process(target=embed_slowly, args=(folder, tmp_path, clip_folder))
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "vectors-00001.parquet").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # in the midst of the last shard
    process.kill()
    process.join()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("vectors-*.parquet")}
    assert sorted(before) == ["vectors-00000.parquet", "vectors-00001.parquet"]
    embed(folder, tmp_path, clip_folder, batch_size=8, shard_rows=20)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    expected = read(embedded)
    found = read(tmp_path)
    assert set(found) == set(expected)
    assert all(found[name].equals(expected[name]) for name in expected)


def test_processes_share_the_shards(embedded, folder, clip_folder, tmp_path, monkeypatch):
    for rank in ("1", "0"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        embed(folder, tmp_path, clip_folder, batch_size=8, shard_rows=20)
        if rank == "1":
            assert [path.name for path in tmp_path.glob("vectors-*")] == ["vectors-00001.parquet"]
    expected = read(embedded)
    assert all(table.equals(expected[name]) for name, table in read(tmp_path).items())


def test_other_settings_are_refused(embedded, folder, clip_folder, tmp_path):
    with pytest.raises(ValueError, match="begun with another shard_rows"):
        embed(folder, embedded, clip_folder, shard_rows=10)
    (tmp_path / "x.jsonl").write_text('{"number": 1}\n')
    with pytest.raises(ValueError, match="no column of it holds image, text"):
        embed(tmp_path, tmp_path / "out", clip_folder)


@pytest.fixture
def copied(folder, tmp_path):
    """The first ten images, in a folder that a test may change."""
    source = tmp_path / "source"
    source.mkdir()
    for i in range(10):
        shutil.copy(folder / f"{10 if i == 5 else i:02}.png", source / f"{i:02}.png")
    return source


@pytest.mark.parametrize("change", ["new", "gone", "changed", "renamed"])
def test_a_run_is_not_mixed_with_other_files(change, copied, clip_folder, tmp_path):
    output = embed(copied, tmp_path / "out", clip_folder, shard_rows=4)
    (output / "vectors-00002.parquet").unlink()
    before = read(output)
    if change == "new":
        shutil.copy(copied / "00.png", copied / "-1.png")
    elif change == "gone":
        (copied / "03.png").unlink()
    elif change == "changed":
        shutil.copyfile(copied / "01.png", copied / "03.png")
    else:
        (copied / "03.png").rename(copied / "03b.png")
    kinds = {"new": "1 new .-1.png.", "gone": "1 gone .03.png.", "changed": "1 changed .03.png.", "renamed": "1 new"}
    with pytest.raises(ValueError, match=f"other files, of which now are {kinds[change]}.*choose another output"):
        embed(copied, output, clip_folder, shard_rows=4)
    assert read(output) == before


def test_times_alone_do_not_matter(copied, clip_folder, tmp_path):
    output = embed(copied, tmp_path / "out", clip_folder, shard_rows=4)
    expected = read(output)
    (output / "vectors-00001.parquet").unlink()
    for path in copied.iterdir():
        os.utime(path, (1, 1))
    embed(copied, output, clip_folder, shard_rows=4)
    assert all(table.equals(expected[name]) for name, table in read(output).items())


def test_a_run_is_not_mixed_with_another_model_or_other_options(copied, clip_folder, tmp_path):
    output = embed(copied, tmp_path / "out", clip_folder, shard_rows=4)
    with pytest.raises(ValueError, match="another id_column"):
        embed(copied, output, clip_folder, shard_rows=4, id_column="image")
    with pytest.raises(ValueError, match="another source_options"):
        embed(copied, output, clip_folder, shard_rows=4, source_options={"image": {"resample": 2}})
    with pytest.raises(ValueError, match="another dtype, weights"):
        embed(copied, output, clip_folder, shard_rows=4, dtype="bfloat16")
    model = AutoModel.from_pretrained(clip_folder)
    model.text_model.layers[0].mlp.fc1.weight.data[0, 0] += 1
    other = tmp_path / "model"
    shutil.copytree(clip_folder, other)
    embed(copied, output, other, shard_rows=4)  # the same content elsewhere
    model.save_pretrained(other)
    with pytest.raises(ValueError, match="another weights"):
        embed(copied, output, other, shard_rows=4)
    settings = json.loads((output / "embed.json").read_text())
    (output / "embed.json").write_text(json.dumps(settings | {"model": str(other)}))
    with pytest.raises(ValueError, match="its weights are not those"):
        read_embedder(output)
    (output / "embed.json").write_text("{")
    with pytest.raises(ValueError, match="embed.json: missing or damaged"):
        embed(copied, output, clip_folder, shard_rows=4)


def test_a_vector_that_is_not_finite_is_an_error_row(copied, clip_folder, tmp_path, caplog):
    model = AutoModel.from_pretrained(clip_folder)
    model.vision_model.projection.weight.data[0, 0] = torch.nan
    shutil.copytree(clip_folder, tmp_path / "nan")
    model.save_pretrained(tmp_path / "nan")
    output = embed(copied, tmp_path / "out", tmp_path / "nan", columns={"image": "image"})
    tables = read(output)
    assert tables["vectors-00000.parquet"].num_rows == 0
    assert tables["errors-00000.parquet"]["row"].to_pylist() == list(range(10))
    assert "zero or not finite" in tables["errors-00000.parquet"]["error"][0].as_py()
    assert "10 of 10 rows are errors" in caplog.text
    with pytest.raises(ValueError, match="holds no vector of image: all 10 rows are errors"):
        read_vectors(output, "image")
    embedder = hfvlm.Embedder.from_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match="image 0: the model gives it a vector that is zero or not finite"):
        embedder.encode(image=str(copied / "00.png"))
    result = CliRunner().invoke(app, ["embed", str(copied), "-o", str(tmp_path / "b"), "-m", str(tmp_path / "nan")])
    assert result.exit_code == 1
    assert "0 rows embedded, 10 errors" in result.output


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4", float("nan"), float("inf"), None])
@pytest.mark.parametrize("name", ["batch_size", "shard_rows"])
def test_numbers_are_checked(name, value, copied, clip_folder, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1"):
        embed(copied, tmp_path / "out", clip_folder, **{name: value})
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_leaves_nothing(copied, clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hfvlm.Embedder, "features", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embed(copied, tmp_path / "out", clip_folder)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def recordings(tmp_path):
    """A folder of three recordings."""
    source, random = tmp_path / "source", np.random.RandomState(0)
    source.mkdir()
    for i in range(3):
        soundfile.write(source / f"{i}.wav", random.randn(16000).astype(np.float32) / 10, 16000)
    return source


def add_images(source):
    (source / "sub").mkdir()
    for i in range(2):
        pixels = np.random.RandomState(i).randint(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(source / "sub" / f"{i}.png")
    (source / "3.wav").write_bytes(b"RIFF")


def add_depth(source):
    (source / "depth").mkdir()
    np.save(source / "depth" / "0.npy", np.random.RandomState(0).rand(40, 40).astype(np.float32) * 5 + 1)


def add_captions(source):
    lines = [{"file_name": f"{i}.wav", "caption": caption} for i, caption in enumerate(("rain", None, "wind"))]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


WAVES = ["0.wav", "1.wav", "2.wav"]


@pytest.mark.parametrize(
    ("add", "expected", "counts"),
    [
        (lambda _: None, {"audio": WAVES}, (3, 0)),
        (add_images, {"audio": WAVES, "image": ["sub/0.png", "sub/1.png"]}, (5, 1)),
        (add_depth, {"audio": WAVES, "depth": ["depth/0.npy"]}, (4, 0)),
        (add_captions, {"audio": ["0.wav", "2.wav"], "text": ["0.wav", "2.wav"]}, (2, 1)),
    ],
    ids=["audio", "mixed", "sensors", "metadata"],
)
def test_folders_of_other_media(add, expected, counts, recordings, imagebind_folder, tmp_path):
    """Without the decoders of `datasets`."""
    add(recordings)
    output = embed(recordings, tmp_path / "out", imagebind_folder)
    embedder = hfvlm.Embedder.from_pretrained(imagebind_folder)
    for modality, names in expected.items():
        vectors, _ = read_vectors(output, modality)
        assert [Path(name).relative_to(recordings).as_posix() for name in vectors.ids] == names
        given = ["rain", "wind"] if modality == "text" else [str(recordings / name) for name in names]
        np.testing.assert_allclose(vectors.vectors, embedder.encode(**{modality: given}), atol=1e-5)
    assert count_rows(output) == counts


@pytest.mark.parametrize("form", ["tars", "parquet"])
def test_audio_in_tars_and_tables(form, recordings, imagebind_folder, tmp_path):
    """Without the decoders of `datasets`, streamed and not."""
    import datasets

    table = tmp_path / "table"
    table.mkdir()
    contents = [path.read_bytes() for path in sorted(recordings.iterdir())]
    if form == "tars":
        with tarfile.open(table / "a.tar", "w") as tar:
            for i, content in enumerate(contents):
                info = tarfile.TarInfo(f"{i}.wav")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        encoded = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        rows = [{"audio": {"bytes": content, "path": None}} for content in contents]
        rows = datasets.Dataset.from_list(rows, datasets.Features({"audio": encoded}))
        rows.cast(datasets.Features({"audio": datasets.Audio()})).to_parquet(table / "a.parquet")
    vectors, _ = read_vectors(embed(table, tmp_path / "out", imagebind_folder), "audio")
    embedder = hfvlm.Embedder.from_pretrained(imagebind_folder)
    np.testing.assert_allclose(vectors.vectors, embedder.encode(audio=contents), atol=1e-5)
    loaded = load_rows(str(table), split="train")
    column = loaded["wav" if form == "tars" else "audio"]
    np.testing.assert_allclose(vectors.vectors, embedder.encode(audio=list(column)), atol=1e-5)


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_tars_and_tables(form, folder, clip_folder, tmp_path):
    good = [i for i in range(10) if i != 5]
    if form == "webdataset":
        with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
            for i in good:
                for suffix, content in (("png", (folder / f"{i:02}.png").read_bytes()), ("txt", b"a caption")):
                    info = tarfile.TarInfo(f"key{i}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    else:
        import datasets

        files = [{"bytes": (folder / f"{i:02}.png").read_bytes(), "path": None} for i in good]
        rows = [{"image": file, "text": "a caption", "name": f"key{i}"} for i, file in zip(good, files, strict=True)]
        datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(
            tmp_path / "pictures.parquet"
        )
    output = tmp_path / "out"
    id_column = "name" if form == "parquet" else None
    (tmp_path / "pictures").mkdir()
    for path in tmp_path.glob("pictures.*"):
        path.rename(tmp_path / "pictures" / path.name)
    embed(tmp_path / "pictures", output, clip_folder, id_column=id_column)
    table = parquet.read_table(output / "vectors-00000.parquet")
    assert table["id"].to_pylist() == [f"key{i}" for i in good]
    expected = hfvlm.Embedder.from_pretrained(clip_folder).encode(image=[str(folder / f"{i:02}.png") for i in good])
    np.testing.assert_allclose(np.array(table["image"].to_pylist()), expected, atol=1e-5)


def test_the_commands(folder, clip_folder, tmp_path):
    run = CliRunner().invoke
    result = run(app, ["embed", str(folder), "-o", str(tmp_path / "out"), "-m", str(clip_folder), "--optimize"])
    assert result.exit_code == 0, result.output
    kind = KINDS[10]
    page, grid = tmp_path / "page.html", tmp_path / "grid.png"
    search = ["search", str(tmp_path / "out"), "--text", kind.caption(), "-k", "7"]
    result = run(app, [*search, "--html", str(page), "--grid", str(grid)])
    assert result.exit_code == 0, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 7
    assert "10.png" in lines[0]
    assert page.read_text().count("data:image/jpeg;base64") == 7
    with Image.open(grid) as picture:
        assert picture.size == (5 * 248, 2 * 248)
    # a small red circle, with less of what is small and more of what is large
    query = [f"a small {kind.colour} {kind.shape}", "small::-0.7", "large::0.7"]
    result = run(app, ["search", str(tmp_path / "out"), *[part for text in query for part in ("--text", text)]])
    assert result.exit_code == 0, result.output
    result = run(
        app, ["search", str(tmp_path / "out"), "--image", str(folder / "11.png"), "--among", "text", "-k", "1"]
    )
    assert "11.png" in result.output


def test_weights_of_a_query_follow_two_colons():
    assert weighed("a cat") == ("a cat", 1.0)
    assert weighed("C::\\cat.png::-2") == ("C::\\cat.png", -2.0)
    with pytest.raises(ValueError, match="'much' is no weight"):
        weighed("cat::much")


def test_a_folder_of_something_else_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["search", str(tmp_path), "--text", "x"])
    assert isinstance(result.exception, FileNotFoundError)
    assert "no folder of `hfvlm embed`" in str(result.exception)


@pytest.mark.parametrize("to", ["lancedb", "qdrant"])
def test_a_database_answers_as_files_do(to, embedded, folder, clip_folder, tmp_path, monkeypatch):
    """Begun, stopped in the middle, gone on with, and searched from a terminal."""
    pytest.importorskip({"lancedb": "lancedb", "qdrant": "qdrant_client"}[to], reason=f"comes with hfvlm[{to}]")
    insert, calls = DatabaseStore.write, []

    def stopped(store, number, table):
        if number == 1:
            store.insert(table.slice(0, 5))
            raise KeyboardInterrupt
        calls.append(number)
        insert(store, number, table)

    output, options = tmp_path / "out", {"batch_size": 8, "shard_rows": 20, "to": to}
    with monkeypatch.context() as patch:
        patch.setattr(DatabaseStore, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            embed(folder, output, clip_folder, **options)
    assert calls == [0]
    embed(folder, output, clip_folder, **options)
    assert count_rows(output) == count_rows(embedded) == (46, 2)
    for modality in ("image", "text"):
        (expected, paths), (found, found_paths) = (read_vectors(each, modality) for each in (embedded, output))
        assert (found.ids, found_paths) == (expected.ids, paths)
        np.testing.assert_array_equal(found.vectors, expected.vectors)
    assert read_captions(output) == read_captions(embedded)
    for arguments in (
        ["--text", "a large red circle", "-k", "9"],
        ["--image", str(folder / "11.png"), "--among=text"],
    ):
        printed = [
            CliRunner().invoke(app, ["search", str(each), *arguments, "--json"]).output for each in (embedded, output)
        ]
        assert len(json.loads(printed[0])) in (9, 10)
        assert printed[0] == printed[1]
    with pytest.raises(ValueError, match="begun with another to"):
        embed(folder, output, clip_folder, batch_size=8, shard_rows=20)
    shutil.move(output / "embed.json", tmp_path)
    with pytest.raises(ValueError, match="but no embed.json"):
        embed(folder, output, clip_folder, **options)
