"""Runs over whole data sets that write Parquet shards, and may be killed and started again."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hfvlm.logs import shows_progress
from hfvlm.media.rows import path_of
from hfvlm.writing import replaced

# A row of the data set, with its number.
Row = tuple[int, dict[str, Any]]
Columns = dict[str, list[Any]]


def run_shards(
    rows: Any,
    output: Path,
    settings: Mapping[str, Any],
    tables: Callable[[list[Row], int], tuple[Any, Columns]],
    *,
    settings_name: str,
    name: str,
    shard_rows: int,
) -> None:
    """Write `<name>-<n>.parquet` for every shard, and `errors-<n>.parquet` where there are any.

    A file appears when it is complete, the shard's errors before its rows; what is there is not done again. Of several
    processes (torchrun, accelerate) each does its share.

    Args:
        rows: a data set that streams.
        output: the folder.
        settings: all that the content depends on; a folder that was begun with others is refused.
        tables: a shard's rows and its number -> a pyarrow table of what became of them, and the columns of errors.
        settings_name: the file's name that keeps the settings.
        name: of the shards.
        shard_rows: rows of a shard.

    Raises:
        ValueError: the folder was begun with other settings.
    """
    import pyarrow
    from pyarrow import parquet

    begin(output / settings_name, dict(settings))
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    shown = Console(stderr=True, quiet=not shows_progress())
    with Progress(*columns, TextColumn("{task.fields[rate]}"), console=shown) as progress:
        task = progress.add_task("rows", total=None, rate="")
        for number, shard in missing_shards(rows, shard_rows, output, name):
            table, errors = tables(shard, number)
            if next(iter(errors.values())):
                with replaced(output / f"errors-{number:05}.parquet") as file:
                    parquet.write_table(pyarrow.table(errors), file)
            with replaced(output / f"{name}-{number:05}.parquet") as file:
                parquet.write_table(table, file)
            progress.advance(task, len(shard))
            speed = progress.tasks[0].speed
            progress.update(task, rate=f"{speed:.1f} rows/s" if speed else "")


def begin(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or check that an earlier run had the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if other := [name for name in settings if earlier.get(name) != settings[name]]:
            raise ValueError(
                f"{path}: this folder was begun with another {', '.join(other)}: choose another output, or remove it."
            )
        return
    with replaced(path) as file:
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def missing_shards(rows: Any, size: int, output: Path, name: str) -> Iterator[tuple[int, list[Row]]]:
    """The shards that are not there yet and that fall to this process: numbers and numbered rows."""
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def there(number: int) -> bool:
        return (output / f"{name}-{number:05}.parquet").exists()

    number = 0
    while there(number):
        number += 1
    remaining = iter(rows.skip(number * size))
    while True:
        wanted = number % processes == rank and not there(number)
        shard = [(number * size + i, row if wanted else {}) for i, row in enumerate(islice(remaining, size))]
        if not shard:
            return
        if wanted:
            yield number, shard
        number += 1


def named(place: int, row: Mapping[str, Any], columns: Sequence[str], id_column: str | None) -> tuple[str, str | None]:
    """What a row is called, and where its medium lies, if it says so."""
    path = next((found for column in columns if (found := path_of(row[column]))), None)
    return str(row[id_column] if id_column else row.get("__key__") or path or place), path


def append(columns: Columns, values: Mapping[str, Any]) -> None:
    """A row at the columns' ends."""
    for name, value in values.items():
        columns[name].append(value)
