"""Runs over whole data sets that write shards, and may be killed and started again."""

import json
import logging
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hfvlm.checks.ranges import check_integer
from hfvlm.inference.pins import Pins, difference
from hfvlm.inference.stores import Store
from hfvlm.logs import shows_progress
from hfvlm.media.rows import columns_by_name, load_rows, path_of
from hfvlm.writing import replaced

logger = logging.getLogger(__name__)

# A row of the data set, with its number.
Row = tuple[int, dict[str, Any]]
# A shard's table, and the rows of its errors, with "row" and "error".
Tables = tuple[Any, list[dict[str, Any]]]
# A shard's number, the number of its rows, and its tables.
Result = tuple[int, int, Any, list[dict[str, Any]]]
FILES = "files.json"
# Settings of runs from before there was a choice.
EARLIER = {"to": "parquet"}


@dataclass(frozen=True)
class Run:
    """The output of a run, and all that its content depends on.

    Args:
        output: the folder.
        store: what takes the shards.
        settings_name: of the file with the settings.
        shard_rows: rows of a shard.
        settings: a folder that was begun with others is refused.
        data: the files that the rows come from; a folder that was begun with others is refused.
        about: further entries of the settings' file, which may change.
    """

    output: Path
    store: Store
    settings_name: str
    shard_rows: int
    settings: Mapping[str, Any]
    data: Pins
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integer("shard_rows", self.shard_rows)

    def check(self) -> None:
        """Refuse a folder that an earlier run began with anything else, or that is not one of such a run.

        Raises:
            ValueError: the message names what is different, and the remedy.
        """
        path = self.output / self.settings_name
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"{self.output}: is a file; choose another output.")
        if not path.exists():
            if foreign := self.store.foreign():
                raise ValueError(f"{self.output}: holds {foreign}, but no {path.name}: choose another output.")
            return
        earlier, settings = EARLIER | read_json(path), json.loads(json.dumps(self.settings))
        if other := [name for name in settings if earlier.get(name) != settings[name]]:
            raise ValueError(
                f"{path}: this folder was begun with another {', '.join(other)}: choose another output, or remove it."
            )
        if found := difference(read_json(self.output / FILES), self.data):
            raise ValueError(
                f"{self.output}: this folder was begun with other files, of which now are {found}: choose another "
                "output, or remove this one to begin again."
            )
        self.store.resume(self.shard_rows)

    def begin(self) -> None:
        """Write what the run depends on, the settings last."""
        if (self.output / self.settings_name).exists():
            return
        self.output.mkdir(parents=True, exist_ok=True)
        with replaced(self.output / FILES) as file:
            file.write_text(json.dumps(self.data) + "\n", encoding="utf-8")
        with replaced(self.output / self.settings_name) as file:
            settings = {**self.about, **self.settings, "shard_rows": self.shard_rows}
            file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def write(self, number: int, table: Any, errors: list[dict[str, Any]]) -> None:
        """Write a shard, its errors before its rows."""
        import pyarrow
        from pyarrow import parquet

        self.begin()
        if errors:
            with replaced(self.output / f"errors-{number:05}.parquet") as file:
                parquet.write_table(pyarrow.Table.from_pylist(errors), file)
        self.store.write(number, table)


def missing_shards(rows: Any, shard_rows: int, complete: Container[int]) -> Iterator[tuple[int, list[Row]]]:
    """Yield the shards that are not complete and that fall to this process: numbers and numbered rows.

    Args:
        rows: a data set that streams.
        shard_rows: rows of a shard.
        complete: the numbers of complete shards.

    Raises:
        ValueError: there is no row.
    """
    rank, number = int(os.environ.get("RANK", "0")), 0
    while number in complete:
        number += 1
    remaining = iter(rows.skip(number * shard_rows))
    while True:
        wanted = number % processes() == rank and number not in complete
        part = enumerate(islice(remaining, shard_rows))
        shard = [(number * shard_rows + i, row if wanted else {}) for i, row in part]
        if not shard:
            if number == 0:
                raise ValueError("The data set holds no rows.")
            return
        if wanted:
            yield number, shard
        number += 1


def processes() -> int:
    """Count the processes that torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_shards(rows: Any, run: Run, tables: Callable[[list[Row], int], Tables]) -> None:
    """Write every shard that is missing, one after the other, as `write_shards`.

    Args:
        rows: a data set that streams.
        run: the output, and what it depends on.
        tables: a shard's rows and its number -> a pyarrow table of results, and the rows of errors.

    Raises:
        ValueError: as `write_shards`, or there are no rows.
    """

    def results() -> Iterator[Result]:
        for number, shard in missing_shards(rows, run.shard_rows, run.store.shards()):
            yield number, len(shard), *tables(shard, number)

    write_shards(run, results())


def write_shards(run: Run, results: Iterable[Result]) -> None:
    """Write shards in the order in which they come, and `errors-<n>.parquet` where there are any.

    A shard appears when it is complete. Several processes (torchrun, accelerate) share the shards. A run that fails
    before its first shard leaves nothing.

    Args:
        run: the output, and what it depends on.
        results: of each shard its number, its number of rows, a pyarrow table, and the rows of errors; nothing is
            computed before the first is taken.

    Raises:
        ValueError: the folder was begun with other settings or files, or holds something else.
    """
    failed, first, total = 0, "", 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    shown = Console(stderr=True, quiet=not shows_progress())
    with closing(run.store), Progress(*columns, TextColumn("{task.fields[rate]}"), console=shown) as progress:
        run.check()
        task = progress.add_task("rows", total=None, rate="")
        for number, count, table, errors in results:
            run.write(number, table, errors)
            if errors:
                failed, first = failed + len(errors), first or f"row {errors[0]['row']}: {errors[0]['error']}"
            total += count
            progress.advance(task, count)
            speed = progress.tasks[0].speed
            progress.update(task, rate=f"{speed:.1f} rows/s" if speed else "")
        run.store.finish()
    if failed:
        logger.warning(
            "%s: %d of %d rows are errors, see errors-*.parquet; the first, %s", run.output, failed, total, first
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that an earlier run wrote.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: missing or damaged ({error}): choose another output, or remove this.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged: choose another output, or remove this.")
    return content


def earlier_data(output: Path) -> Pins | None:
    """Read which files an earlier run was begun with, if there was one."""
    return read_json(output / FILES) if (output / FILES).exists() else None


def open_rows(
    source: str, split: str, columns: Mapping[str, str] | None, id_column: str | None
) -> tuple[Any, dict[str, str]]:
    """Open a data set that streams; return its rows and the column of each modality, by default by the usual names.

    Raises:
        ValueError: it lacks a column that is named.
    """
    rows = load_rows(source, split=split, streaming=True)
    names = list(rows.features or next(iter(rows), {}))
    found = dict(columns or columns_by_name(names))
    if missing := [name for name in (*found.values(), *filter(None, [id_column])) if name not in names]:
        raise ValueError(f"{source}: has no column {', '.join(missing)}; it has {', '.join(names)}.")
    return rows, found


def absolute(location: str | Path) -> str:
    """Return a folder's whole path; anything else, as a Hub id, as it is."""
    return str(Path(location).resolve()) if Path(location).is_dir() else str(location)


def named(
    number: int, row: Mapping[str, Any], columns: Sequence[str], id_column: str | None
) -> tuple[str, str | None]:
    """Return a row's id, and the path of its media file, if it has one."""
    path = next((found for column in columns if (found := path_of(row.get(column)))), None)
    name = row.get(id_column) if id_column else row.get("__key__") or path
    return str(number if name is None else name), path
