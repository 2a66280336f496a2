"""What all procedures share: sources, shards, folders that are refused."""

import csv
import io
import tarfile

import pytest

from hfvlm.data.nouns import nouns
from hfvlm.data.reading import open_source
from hfvlm.samples.scenes import all_scenes

TEXTS = [scene.caption() for scene in all_scenes()[:9]]


def files_of(kind, folder):
    """The same nine rows as a file of each kind."""
    from pyarrow import Table, parquet

    path = folder / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(Table.from_pylist([{"text": text, "number": i} for i, text in enumerate(TEXTS)]), path)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("text", "number"), *((text, i) for i, text in enumerate(TEXTS))])
    else:
        with tarfile.open(path, "w") as tar:
            for i, text in enumerate(TEXTS):
                image = io.BytesIO()
                all_scenes()[i].render().save(image, "PNG")
                for suffix, data in (("png", image.getvalue()), ("txt", text.encode())):
                    about = tarfile.TarInfo(f"{i:03}.{suffix}")
                    about.size = len(data)
                    tar.addfile(about, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "tar"])
def test_files_of_every_kind_are_read_and_written_on(kind, tmp_path, written):
    source = open_source(files_of(kind, tmp_path))
    shards = dict(source.shards(0, 4))
    assert [[source.texts(row)[0] for _, row in shard] for shard in shards.values()] == [
        TEXTS[:4], TEXTS[4:8], TEXTS[8:],
    ]  # fmt: skip
    assert [number for number, _ in shards[2]] == [8]
    assert [n for n, _ in source.shards(1, 4)] == [1, 2]
    report = nouns(source, tmp_path / "out", least=1, by="rules", shard_rows=4)
    assert report.kept == 9
    again = open_source(tmp_path / "out")
    assert [source.texts(row)[0] for _, shard in again.shards(0, 9) for _, row in shard] == TEXTS
    if kind == "tar":
        assert again.media(next(again.shards(0, 1))[1][0][1])["bytes"].startswith(b"\x89PNG")


def test_no_more_than_a_shard_is_read_ahead(tmp_path):
    source, read = open_source(files_of("csv", tmp_path)), []

    class Counting:
        def skip(self, count):
            return (read.append(i) or {"text": "a", "number": i} for i in range(count, 100))

    object.__setattr__(source, "rows", Counting())
    shards = source.shards(1, 5)
    assert [number for number, _ in next(shards)[1]] == [5, 6, 7, 8, 9]
    assert read == [5, 6, 7, 8, 9]


def test_paths_in_files_are_relative_to_them(tmp_path, jsonl):
    (tmp_path / "a.png").write_bytes(b"")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"image": "a.png", "text": "a"}\n{"image": "b.png", "text": "b"}\n')
    source = open_source(path)
    assert [source.media(row) for _, row in next(source.shards(0, 2))[1]] == [str(tmp_path / "a.png"), "b.png"]


def test_other_folders_and_settings_are_refused(tmp_path, jsonl, monkeypatch):
    rows = jsonl([{"text": text} for text in TEXTS])
    nouns(rows, tmp_path / "out", least=1, by="rules")
    with pytest.raises(ValueError, match="begun with another least"):
        nouns(rows, tmp_path / "out", least=2, by="rules")
    changed = rows.read_text()
    rows.write_text(changed + '{"text": "one more"}\n')
    with pytest.raises(ValueError, match=r"begun with other files, of which now are 1 changed \(rows.jsonl\)"):
        nouns(rows, tmp_path / "out", least=1, by="rules")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine: holds files of something else"):
        nouns(rows, tmp_path / "mine", least=1, by="rules")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs as one process"):
        nouns(rows, tmp_path / "two", least=1, by="rules")


def test_columns_and_files_are_named_in_errors(tmp_path, jsonl):
    rows = jsonl([{"alt": "a red circle"}])
    with pytest.raises(ValueError, match="no column of it holds texts: name one, as --column text=COLUMN; it has alt"):
        nouns(rows, tmp_path / "out", by="rules")
    with pytest.raises(ValueError, match="has no column caption; it has alt"):
        open_source(rows, columns={"text": "caption"})
    (tmp_path / "rows.xml").write_text("<a/>")
    with pytest.raises(ValueError, match="rows are read from .jsonl"):
        open_source(tmp_path / "rows.xml")
    empty = tmp_path / "rows.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        open_source(empty)
