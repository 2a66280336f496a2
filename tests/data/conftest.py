"""Sets of noisy pairs whose noise is known."""

import json

import pytest

from hfvlm.samples.noisy_pairs import noisy_pairs, write_pairs

JUNK = ("boilerplate", "gibberish", "short", "long", "tiny", "elongated", "damaged")
ROWS = 240


@pytest.fixture(scope="session")
def noisy_folder(tmp_path_factory):
    """Pairs of which a half is junk, a tenth has wrong captions and a tenth are duplicates. Read only."""
    shares = dict.fromkeys(JUNK, 0.07) | {"wrong": 0.1, "duplicate": 0.1}
    return write_pairs(tmp_path_factory.mktemp("noisy") / "rows", noisy_pairs(ROWS, shares, seed=3))


@pytest.fixture(scope="session")
def noisy_rows(noisy_folder):
    """The rows of its metadata."""
    return [json.loads(line) for line in (noisy_folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory):
    """Write rows as JSON lines, and return the file."""

    def write(rows, name="rows"):
        path = tmp_path_factory.mktemp("lines") / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="session")
def content():
    """Read all tables of an output."""
    from pyarrow import parquet

    def read(folder):
        return {path.name: parquet.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))}

    return read


@pytest.fixture(scope="session")
def written(content):
    """Read the rows of an output."""

    def read(folder):
        tables = content(folder)
        return [row for name, table in tables.items() if name.startswith("train-") for row in table]

    return read
