"""Near duplicates within a training set and against test sets, as CLIP's analysis of overlap
(https://arxiv.org/abs/2103.00020, section 5 and appendix C)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfvlm.data.near import Hit, Likeness, Near, Perceptual, TestSets
from hfvlm.data.overlap import OVERLAP, check_evaluations, overlap_tables, write_overlap
from hfvlm.data.procedure import SHARD_ROWS, Decision, Procedure, run_procedure
from hfvlm.data.reading import Source, as_source
from hfvlm.data.report import Report
from hfvlm.data.store import Store
from hfvlm.inference.shards import Row

__all__ = ["OVERLAP", "dedupe"]


def dedupe(
    source: Source | str | Path,
    output: str | Path,
    likeness: Likeness | None = None,
    *,
    tests: Mapping[str, str] | None = None,
    evaluations: Mapping[str, str | Path] | None = None,
    shard_rows: int = SHARD_ROWS,
) -> Report:
    """Drop rows whose image is a near duplicate of one before it, or of one in a test set.

    `overlap.parquet` in the output has a row for each pair of a test row and a training row that are the same. With
    the reports of evaluations, the report compares the accuracy on the test rows with a copy in the training set
    (overlap) with that on the others (clean). For the rest of the output see `run_procedure`.

    Args:
        source: what `open_source` opened, or takes.
        output: a folder.
        likeness: what counts as the same: `Perceptual()` by default, or `Embedded(embedder)`.
        tests: data sets by name, of their split "test"; "folder::split" for another.
        evaluations: by the name of a test set, the report of `hfvlm eval` on it, of a model that was trained on the
            source.
        shard_rows: rows that are read at a time.

    Raises:
        ValueError: there are no images, an evaluation is of no test set or of other rows, or see `run_procedure`.
    """
    opened = as_source(source, output)
    opened.needs("image")
    sets = TestSets.open(tests or {}, likeness or Perceptual())
    check_evaluations(evaluations or {}, sets.names)
    return run_procedure(Dedupe(opened, sets, evaluations or {}), output, shard_rows=shard_rows)


class Dedupe(Procedure):
    """Near duplicates: a pass describes images, and another looks each up among those before it."""

    name, passes = "dedupe", ("describe",)

    def __init__(self, source: Source, tests: TestSets, evaluations: Mapping[str, str | Path]):
        super().__init__(source)
        self.tests, self.evaluations = tests, evaluations

    @property
    def settings(self) -> dict[str, Any]:
        return {"tests": self.tests.settings, "evaluations": {k: str(v) for k, v in self.evaluations.items()}}

    def begin(self, store: Store) -> None:
        store.create("overlap", "grp INTEGER, test INTEGER, row INTEGER, value REAL", "grp, test, row")
        self.near = Near(store, self.tests.likeness)
        self.tests.describe(self.near)

    def describe(self, shard: Sequence[Row], store: Store) -> None:
        """Describe the images of a shard."""
        self.near.describe(0, [(number, self.source.media(row)) for number, row in shard])

    def ended(self, name: str, store: Store) -> None:
        self.near.prepare()

    def decide(self, shard: Sequence[Row], store: Store) -> Iterator[Decision]:
        self.near.comparisons = 0
        for number, row in shard:
            decision = Decision(number, text=self.source.shown(row))
            descriptor = self.near.descriptor(0, number)
            if descriptor is None:
                decision.reasons = ["unreadable"]
            elif hits := self.tests.hits(self.near, descriptor):
                self.overlaps(store, number, hits)
                decision.reasons = ["test-duplicate"]
                decision.note = f"row {hits[0].row} of {self.tests.names[hits[0].group - 1]}"
            elif first := next(self.near.hits(0, descriptor), None):
                decision.reasons, decision.note = ["duplicate"], f"row {first.row}, {first.value:.3g}"
            else:
                self.near.add(0, number, descriptor)
                decision.rows = [row]
            yield decision
        store.add("comparisons", self.near.comparisons)

    @staticmethod
    def overlaps(store: Store, number: int, hits: Sequence[Hit]) -> None:
        """Store the test rows that a row is the same as."""
        store.connection.executemany(
            "INSERT OR REPLACE INTO overlap VALUES (?, ?, ?, ?)",
            ((hit.group, hit.row, number, hit.value) for hit in hits),
        )

    def details(self, store: Store, output: Path) -> dict[str, Any]:
        rows = store.one("SELECT count(*) FROM described")
        found: dict[str, Any] = {
            "comparisons": int(store.get("comparisons")),
            "comparisons of all pairs": rows * (rows - 1) // 2,
            "bands": int(store.get("bands")),
            "bits of a band": int(store.get("band width")),
        }
        if self.tests.sources:
            write_overlap(store, self.tests.names, output)
            found |= overlap_tables(store, self.tests.names, self.evaluations)
        return found
