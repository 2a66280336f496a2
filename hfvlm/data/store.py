"""What a procedure counts, in a file: memory stays bounded, and a run that was killed continues."""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

CACHE_KIBIBYTES = 65_536


class Store:
    """Tables in a file of SQLite, and how many shards each pass has gone through.

    Args:
        path: of the file; it is made where there is none.
    """

    def __init__(self, path: Path):
        self.connection = sqlite3.connect(path, isolation_level=None)
        # A file that a killed process left is whole; the last shard before a power cut may be repeated.
        for setting in ("journal_mode=WAL", "synchronous=NORMAL", f"cache_size=-{CACHE_KIBIBYTES}"):
            self.connection.execute(f"PRAGMA {setting}")
        self.connection.execute("CREATE TABLE IF NOT EXISTS done (pass TEXT PRIMARY KEY, shards INTEGER)")
        self.connection.execute("CREATE TABLE IF NOT EXISTS numbers (name TEXT PRIMARY KEY, value REAL)")

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()

    def done(self, name: str) -> int:
        """Return the number of shards that a pass has gone through."""
        return int(self.one("SELECT shards FROM done WHERE pass = ?", name) or 0)

    @contextmanager
    def step(self, name: str, number: int) -> Iterator[None]:
        """Write all that the block writes, and that the pass has gone through shard `number`, or nothing."""
        self.connection.execute("BEGIN")
        try:
            yield
            self.connection.execute(
                "INSERT INTO done VALUES (?, ?) ON CONFLICT (pass) DO UPDATE SET shards = excluded.shards",
                (name, number + 1),
            )
            self.connection.execute("COMMIT")
        except BaseException:
            self.connection.execute("ROLLBACK")
            raise

    def create(self, table: str, columns: str, key: str) -> None:
        """Create a table that is sorted by its key, if there is none."""
        self.connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns}, PRIMARY KEY ({key})) WITHOUT ROWID")

    def counts(self, table: str) -> None:
        """Create a table of numbers of times, by key, with names."""
        self.create(table, "key INTEGER, name TEXT, n INTEGER", "key")

    def count(self, table: str, found: Mapping[int, tuple[str | None, int]]) -> None:
        """Add numbers of times, {key: (name, times)}, to a table of `counts`."""
        self.connection.executemany(
            f"INSERT INTO {table} VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET n = n + excluded.n",
            ((key, name, times) for key, (name, times) in found.items()),
        )

    def run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """Run a statement."""
        return self.connection.execute(statement, values)

    def one(self, statement: str, *values: Any) -> Any:
        """Return the first value of the first row that a statement finds, or None."""
        row = self.connection.execute(statement, values).fetchone()
        return row[0] if row else None

    def add(self, name: str, value: float) -> None:
        """Add to a number of the run."""
        self.run("INSERT INTO numbers VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + ?", name, value,
                 value)  # fmt: skip

    def put(self, name: str, value: float) -> None:
        """Set a number of the run."""
        self.run("INSERT OR REPLACE INTO numbers VALUES (?, ?)", name, value)

    def get(self, name: str, default: float = 0.0) -> float:
        """Return a number of the run."""
        value = self.one("SELECT value FROM numbers WHERE name = ?", name)
        return default if value is None else float(value)
