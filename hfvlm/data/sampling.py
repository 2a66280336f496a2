"""Samples of rows by keys, as queries or phrases: at most N rows of a key, or each with the probability N / count.

Both draw a number for each row and key, from the seed, the row and the key alone: the order of the rows does not
matter, nor where a run was killed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hfvlm.data.store import Store
from hfvlm.data.words import drawn

SHOWN = 20


class Samples:
    """Rows drawn by keys, of which a row may have several; it is kept if any of them takes it.

    Args:
        store: of the run.
        most: rows of a key.
        least: keys with fewer rows take none.
        exact: take exactly `most` rows of a key that has more, those of the lowest numbers; else each row with the
            probability most / count.
        seed: of the numbers.
    """

    def __init__(self, store: Store, *, most: int, least: int = 1, exact: bool = True, seed: int = 0):
        self.store, self.most, self.least, self.exact, self.seed = store, most, least, exact, seed
        store.counts("keys")
        store.create("matches", "key INTEGER, number REAL, row INTEGER", "key, number, row")
        store.create("limits", "key INTEGER, highest REAL, taken INTEGER", "key")

    def count(self, rows: Sequence[tuple[int, Mapping[int, str]]]) -> None:
        """Count the keys, with their names, of numbered rows."""
        names = {key: name for _, keys in rows for key, name in keys.items()}
        counts = Counter(key for _, keys in rows for key in keys)
        self.store.count("keys", {key: (names[key], n) for key, n in counts.items()})
        if self.exact:
            self.store.connection.executemany(
                "INSERT OR IGNORE INTO matches VALUES (?, ?, ?)",
                ((key, drawn(self.seed, number, key), number) for number, keys in rows for key in keys),
            )

    def limit(self) -> None:
        """Find the highest number that each key takes, once in a run."""
        if self.store.done("limits"):
            return
        with self.store.step("limits", 0):
            for key, count in self.store.run("SELECT key, n FROM keys WHERE n >= ?", self.least):
                highest = 1.0 if count <= self.most else self.most / count
                if self.exact and count > self.most:
                    highest = self.store.one(
                        "SELECT number FROM matches WHERE key = ? ORDER BY number LIMIT 1 OFFSET ?", key, self.most - 1
                    )
                self.store.run("INSERT INTO limits VALUES (?, ?, 0)", key, highest)

    def take(self, number: int, keys: Mapping[int, str]) -> tuple[bool, bool]:
        """Decide about a row: whether any of its keys has enough rows, and whether one takes it."""
        known, taken = False, False
        for key in keys:
            highest = self.store.one("SELECT highest FROM limits WHERE key = ?", key)
            known = known or highest is not None
            mine = drawn(self.seed, number, key)
            if highest is not None and (mine <= highest if self.exact else mine < highest):
                taken = True
                self.store.run("UPDATE limits SET taken = taken + 1 WHERE key = ?", key)
        return known, taken

    def details(self, what: str) -> dict[str, Any]:
        """Return numbers of keys, and the table of those with the most rows, for a report."""
        few = self.store.one("SELECT count(*) FROM keys WHERE n < ?", self.least)
        over = self.store.one("SELECT count(*) FROM keys WHERE n > ?", self.most)
        rows = self.store.run(
            "SELECT name, n, coalesce(taken, 0) FROM keys LEFT JOIN limits USING (key) ORDER BY n DESC, name LIMIT ?",
            SHOWN,
        )
        found: dict[str, Any] = {f"{what} that occur": self.store.one("SELECT count(*) FROM keys")}
        found |= {f"{what} with fewer than {self.least} rows": few} if self.least > 1 else {}
        found |= {f"{what} with more than {self.most} rows": over}
        table = [{"name": name, "rows": n, "takes": taken} for name, n, taken in rows]
        return found | {f"{what} with the most rows": table}
