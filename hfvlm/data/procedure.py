"""The run of a procedure: passes that count, then a pass that decides about each row, and a report."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hfvlm.data.reading import Source, table_of
from hfvlm.data.report import DROPPED, REPORT, ROWS, Report, read_report, summary
from hfvlm.data.store import Store
from hfvlm.inference.shards import Row, Run
from hfvlm.inference.stores import ParquetStore
from hfvlm.logs import shows_progress
from hfvlm.writing import replaced

STATE = "state.sqlite"
DECIDE = "decide"
SHARD_ROWS = 4096


@dataclass
class Decision:
    """What becomes of a row.

    Args:
        number: of the row.
        rows: those to write instead; none drops it.
        reasons: names of the rules that it breaks, the deciding one first.
        note: on the first of them, as "120 x 40 pixels".
        text: of the row, for the report.
    """

    number: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    note: str = ""
    text: str = ""


class Procedure(ABC):
    """A procedure over the rows of a source; what it counts is in the store's tables.

    Args:
        source: the rows.
    """

    name: ClassVar[str]
    # Each pass over the rows is a method with its name, `(shard, store) -> None`.
    passes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, source: Source):
        self.source = source

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that the output depends on, apart from the source."""

    @property
    def schema(self) -> Any:
        """Arrow's schema of the rows that are written."""
        return self.source.schema

    def begin(self, store: Store) -> None:  # noqa: B027 (some count nothing)
        """Create the tables."""

    def ended(self, name: str, store: Store) -> None:  # noqa: B027 (nor do they here)
        """Complete a pass that went through all rows; it may be called again."""

    @abstractmethod
    def decide(self, shard: Sequence[Row], store: Store) -> Iterator[Decision]:
        """Decide about the rows of a shard."""

    def details(self, store: Store, output: Path) -> dict[str, Any]:
        """Return what else the report is to contain: numbers, and tables as lists of dictionaries."""
        return {}


def run_procedure(procedure: Procedure, output: str | Path, *, shard_rows: int = SHARD_ROWS) -> Report:
    """Run a procedure, or continue one that was killed.

    The output holds `train-<n>.parquet`, the rows that are kept, which `load_rows`, `hfvlm train` and every other
    command read; `dropped-<n>.parquet`, the numbers of the others with the reasons; and `report.json` and `report.md`.
    Files appear when they are complete. Memory holds one shard; counts are in `state.sqlite` until the report is
    there.

    Args:
        procedure: what to do.
        output: a folder, new or of the same run.
        shard_rows: rows that are read at a time.

    Raises:
        ValueError: the folder is of another run or holds anything else, there are no rows, or several processes were
            started.
    """
    source, output = procedure.source, Path(output)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "hfvlm data runs as one process: rows depend on those before them. Start it without torchrun."
        )
    settings = source.settings | procedure.settings | {"shard_rows": shard_rows}
    run = Run(output, ParquetStore(output, ROWS), f"{procedure.name}.json", shard_rows, settings, source.pins)
    run.check()
    if output.is_dir() and not (output / run.settings_name).exists() and any(output.iterdir()):
        raise ValueError(f"{output}: holds files of something else: choose another output.")
    if (output / REPORT).exists():
        return read_report(output)
    run.begin()
    with Store(output / STATE) as store:
        count(procedure, store, shard_rows)
        for number, shard in tracked(procedure, DECIDE, store, shard_rows):
            with store.step(DECIDE, number):
                write_shard(procedure, run, number, list(procedure.decide(shard, store)))
        if not run.store.path(0).exists():
            raise ValueError(f"{source.location}: the data set holds no rows.")
        report = summary(output, procedure.name, settings, procedure.details(store, output))
    report.write(output)
    for left in output.glob(f"{STATE}*"):
        left.unlink()
    return report


def count(procedure: Procedure, store: Store, shard_rows: int) -> None:
    """Go through the passes before the last."""
    procedure.begin(store)
    for name in procedure.passes:
        for number, shard in tracked(procedure, name, store, shard_rows):
            with store.step(name, number):
                getattr(procedure, name)(shard, store)
        procedure.ended(name, store)


def tracked(procedure: Procedure, name: str, store: Store, shard_rows: int) -> Iterator[tuple[int, list[Row]]]:
    """Yield the shards that a pass has not gone through, with a bar where bars are shown."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    first = store.done(name)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, quiet=not shows_progress())) as progress:
        task = progress.add_task(f"{procedure.name}: {name}", total=None, completed=first * shard_rows)
        for number, shard in procedure.source.shards(first, shard_rows):
            yield number, shard
            progress.advance(task, len(shard))


def write_shard(procedure: Procedure, run: Run, number: int, decisions: list[Decision]) -> None:
    """Write the rows of a shard that are kept, and those that are dropped with the reasons."""
    import pyarrow
    from pyarrow import parquet

    dropped = [
        {"row": each.number, "reasons": each.reasons, "note": each.note, "text": each.text}
        for each in decisions
        if not each.rows
    ]
    kinds = {"row": pyarrow.int64(), "reasons": pyarrow.list_(pyarrow.string())}
    kinds |= {"note": pyarrow.string(), "text": pyarrow.string()}
    with replaced(run.output / f"{DROPPED}-{number:05}.parquet") as file:
        parquet.write_table(pyarrow.Table.from_pylist(dropped, pyarrow.schema(list(kinds.items()))), file)
    rows = [row for each in decisions for row in each.rows]
    run.store.write(number, table_of(rows, procedure.schema, f"{procedure.source.location}, shard {number}"))
