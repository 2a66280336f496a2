"""The stores of vectors: what is written is there once, and what is nearest is the same in each."""

import pickle
import sqlite3
import warnings
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from hfvlm.inference.destinations import KINDS, Destination, open_store
from hfvlm.inference.search import nearest_rows
from hfvlm.inference.stores import ParquetStore, schema_of
from tests.support.qdrant_server import qdrant_server

SIZE, SHARD, SHARDS = 24, 30, 4
KINDS_OF_STORE = [*KINDS, "qdrant server"]
MODULES = {"lancedb": "lancedb", "qdrant": "qdrant_client"}


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def table_of(number):
    """Rows of a shard, of which some have no text, some repeat, and one is missing."""
    random = np.random.RandomState(number)
    images = unit(random.randn(SHARD, SIZE))
    images[10:25] = unit(np.random.RandomState(99).randn(SIZE))
    rows = [
        {
            "row": number * SHARD + i, "id": f"image {number * SHARD + i}", "path": None, "caption": f"caption {i}",
            "image": images[i].tolist(), "text": unit(random.randn(SIZE)).tolist() if i % 3 else None,
        }
        for i in range(SHARD) if i != 7
    ]  # fmt: skip
    return pyarrow.Table.from_pylist(rows, schema_of({"image": SIZE, "text": SIZE}))


@contextmanager
def opened(name, folder):
    kind = name.split()[0]
    if kind in MODULES:
        pytest.importorskip(MODULES[kind], reason=f"comes with hfvlm[{kind}]")
    with qdrant_server() if name != kind else nullcontext() as server:
        url, collection = (server.url, "photos") if server else (None, None)
        with closing(open_store(folder, Destination(kind, url, collection).settings(folder), url)) as store:
            yield store


@pytest.fixture(params=KINDS_OF_STORE)
def store(request, tmp_path):
    with opened(request.param, tmp_path) as store:
        yield store


@pytest.fixture(scope="module", params=KINDS_OF_STORE)
def full(request, tmp_path_factory):
    """A store with all rows. Read only."""
    with opened(request.param, tmp_path_factory.mktemp("full")) as store:
        yield filled(store)


def filled(store):
    """Write the shards in the order in which actors may return them."""
    assert store.foreign() is None
    assert store.sizes() == {}
    for number in (2, 0, 3, 1):
        store.write(number, table_of(number))
    store.finish()
    return store


def everything():
    return pyarrow.concat_tables(table_of(number) for number in range(SHARDS)).to_pylist()


@pytest.mark.parametrize(("modality", "k"), [("image", 5), ("image", 30), ("text", 7), ("text", 1000)])
def test_the_nearest_are_the_same_everywhere(full, modality, k):
    """With their scores, bit for bit, and equal ones in the order of their rows."""
    rows = [row for row in everything() if row[modality] is not None]
    vectors = np.array([row[modality] for row in rows], np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for query in (*np.random.RandomState(5).randn(2, SIZE), np.random.RandomState(99).randn(SIZE)):
        query /= np.linalg.norm(query)
        scores = (vectors * query).sum(axis=1).astype(np.float32)
        best = np.argsort(-scores, kind="stable")[:k]
        hits = nearest_rows(full, modality, query * 3, k)
        assert [hit.id for hit in hits] == [rows[i]["id"] for i in best]
        assert [hit.score for hit in hits] == scores[best].tolist()
        assert [hit.caption for hit in hits] == [rows[i]["caption"] for i in best]
        assert {hit.path for hit in hits} == {None}


def test_what_is_written_is_there(full):
    assert list(full.shards()) == list(range(SHARDS))
    assert full.count() == SHARDS * (SHARD - 1)
    assert full.sizes() == {"image": SIZE, "text": SIZE}
    assert full.foreign() is not None
    rows = [row for table in full.tables(["row", "caption", "text"]) for row in table.to_pylist()]
    expected = [{name: row[name] for name in ("row", "caption", "text")} for row in everything()]
    assert sorted(rows, key=lambda row: row["row"]) == expected


def test_a_shard_that_a_kill_cut_short_is_written_again(store):
    """Its rows are in the database, or some of them, but it is not complete."""
    filled(store)
    store.path(2).unlink()
    if not isinstance(store, ParquetStore):
        store.path(3).unlink()
    again = type(store)(*((store.folder, store.name, store.url, store.collection) if hasattr(store, "url") else
                          (store.folder, store.name)))  # fmt: skip
    store.close()
    again.resume(SHARD)
    missing = sorted(set(range(SHARDS)) - set(again.shards()))
    for number in missing:
        again.write(number, table_of(number))
    again.finish()
    rows = sorted(row for table in again.tables(["row"]) for row in table["row"].to_pylist())
    again.close()
    assert rows == [row["row"] for row in everything()]


@pytest.mark.parametrize("store", KINDS_OF_STORE[1:], indirect=True)
def test_rows_that_are_gone_are_noticed(store):
    filled(store)
    store.path(9).write_text('{"rows": 30}')
    with pytest.raises(ValueError, match="has 116 rows, but the shards .* lists have 146: embed to another output"):
        store.resume(SHARD)


def test_shards_without_rows(store):
    store.write(0, table_of(0).slice(0, 0))
    store.resume(SHARD)
    assert store.count() == 0
    assert list(store.shards()) == [0]


@pytest.mark.parametrize("query", [np.zeros(SIZE), np.full(SIZE, np.nan)])
def test_a_query_without_direction_is_refused(query, tmp_path):
    with pytest.raises(ValueError, match="has no direction"):
        nearest_rows(filled(ParquetStore(tmp_path, "vectors")), "image", query, 3)


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "3"])
def test_a_number_of_hits_is_checked(k, tmp_path):
    with pytest.raises(ValueError, match="k must be an integer of at least 1"):
        nearest_rows(filled(ParquetStore(tmp_path, "vectors")), "image", np.ones(SIZE), k)


def test_a_query_of_another_length_is_refused(full):
    with pytest.raises(ValueError, match="vectors of 24 numbers, not of 25"):
        nearest_rows(full, "image", np.ones(SIZE + 1), 3)


def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    """Beyond 99,999, names are not."""
    store = ParquetStore(tmp_path, "vectors")
    for number in (99_999, 100_000, 1_000_000, 2):
        store.write(number, table_of(0))
    (tmp_path / "vectors-old.parquet").write_bytes(b"")
    assert list(store.shards()) == [2, 99_999, 100_000, 1_000_000]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("csv",), "to must be one of parquet, lancedb, qdrant, not 'csv'"),
        (("parquet", "http://localhost:6333"), "goes with to='qdrant' only"),
        (("lancedb", "http://localhost:6333"), "goes with to='qdrant' only"),
        (("qdrant", None, "photos"), "named on a Qdrant server only"),
        (("qdrant", "localhost:6333"), "is none of a server"),
        (("qdrant", "file:///etc/passwd"), "is none of a server"),
        (("qdrant", "http://"), "is none of a server"),
        (("qdrant", "http://me:secret@host"), "environment variable QDRANT_API_KEY"),
        (("qdrant", "http://host", "a/b"), "letters, digits, dots, dashes and underscores"),
        (("qdrant", "http://host", ""), "letters, digits, dots, dashes and underscores"),
    ],
)
def test_destinations_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        Destination(*given)


def test_a_collection_has_the_name_of_the_output():
    assert Destination("qdrant", "http://host").settings(Path("a/photos")) == {
        "to": "qdrant", "url": "http://host", "collection": "photos",
    }  # fmt: skip
    with pytest.raises(ValueError, match="name is none of a collection"):
        Destination("qdrant", "http://host").settings(Path("my photos"))


def test_a_folder_of_others_names_no_server(tmp_path):
    """A server, and with it the key, is reached only where the user of this call names it."""
    pytest.importorskip("qdrant_client", reason="comes with hfvlm[qdrant]")
    settings = {"to": "qdrant", "url": "http://evil.example", "collection": "photos"}
    with pytest.raises(ValueError, match="in Qdrant at 'http://evil.example': name it with url"):
        open_store(tmp_path, settings)
    with pytest.raises(ValueError, match="are in the folder .parquet.: leave url out"):
        open_store(tmp_path, {}, "http://localhost:6333")
    with pytest.raises(ValueError, match="to 'tape' is none of"):
        open_store(tmp_path, {"to": "tape"})


def test_the_key_goes_to_the_server(tmp_path, monkeypatch):
    pytest.importorskip("qdrant_client", reason="comes with hfvlm[qdrant]")
    told = []
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    monkeypatch.setattr(warnings, "warn", lambda *args, **_: told.append(str(args[0])))
    with qdrant_server() as server:
        settings = Destination("qdrant", server.url, "photos").settings(tmp_path)
        store = open_store(tmp_path, settings, server.url)
        filled(store)
        assert store.foreign() == f"the collection photos at {server.url}"
        store.close()
    assert {key for _, path, key in server.asked if path != "/"} == {"secret"}
    assert told == ["Api key is used with an insecure connection."]
    assert all("secret" not in path.read_text() for path in tmp_path.iterdir())


def test_a_stored_point_that_runs_code_is_refused(tmp_path):
    """The client's local mode unpickles what the folder holds."""
    pytest.importorskip("qdrant_client", reason="comes with hfvlm[qdrant]")
    store = open_store(tmp_path, {"to": "qdrant"})
    filled(store)
    store.close()
    (path,) = tmp_path.rglob("*.sqlite")

    class Point:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    with sqlite3.connect(path) as opened:
        opened.execute("UPDATE points SET point = ? WHERE rowid = 3", (sqlite3.Binary(pickle.dumps(Point())),))
    opened.close()
    with pytest.raises(ValueError, match="holds what is no point"):
        open_store(tmp_path, {"to": "qdrant"}).sizes()
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("kind", sorted(MODULES))
def test_what_is_not_installed_is_named(kind, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, MODULES[kind], None)
    with pytest.raises(ImportError, match=f"`pip install 'hfvlm.{kind}.'`"):
        open_store(tmp_path, {"to": kind})
