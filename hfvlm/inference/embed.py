"""Whole data sets to Parquet shards of vectors, in a run that may be killed and started again."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hfvlm.inference.embedder import Embedder
from hfvlm.inference.index import Index
from hfvlm.media.rows import columns_by_name, load_rows, path_of
from hfvlm.writing import replaced

SETTINGS = "embed.json"
VECTORS, ERRORS = "vectors-{:05}.parquet", "errors-{:05}.parquet"


def embed(
    source: str | Path,
    output: str | Path,
    model: str | Path,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    id_column: str | None = None,
    batch_size: int = 64,
    shard_rows: int = 4096,
    **options: Any,
) -> Path:
    """Embed every row of a data set.

    The output holds `vectors-<n>.parquet` (the row's number, its id, the path of its medium where there is one, and a
    vector for each modality), `errors-<n>.parquet` for the rows that could not be read, and `embed.json`, which says
    what was embedded by what. A shard appears when it is complete; started again, a run goes on after the shards that
    are there. Several processes (torchrun, accelerate) share the shards out among them.

    Args:
        source: a folder of media, webdataset tars, Parquet or a Hub id: what `datasets` reads.
        output: the folder.
        model: the model's folder or Hub id.
        split: of the data set.
        columns: {"image": "photo"}; by default every column whose name is known and whose modality the model knows.
        id_column: by default webdataset's `__key__`, or the medium's path, or the row's number.
        batch_size: rows that the model takes at a time.
        shard_rows: rows of a shard.
        **options: of `Embedder.from_pretrained`.

    Raises:
        ValueError: the output was made with other settings, or no column holds what the model embeds.
        ImportError: `datasets` is not installed.
    """
    output = Path(output)
    rows = load_rows(str(source), split=split, streaming=True)
    named = columns or columns_by_name(rows.features or next(iter(rows)))
    embedder = Embedder.from_pretrained(model, list(columns) if columns else None, **options)
    named = {modality: column for modality, column in named.items() if modality in embedder.modalities}
    if not named:
        raise ValueError(f"{source}: no column of it holds {', '.join(embedder.modalities)}: name them with columns.")
    settings = {"source": str(source), "split": split, "model": str(model), "columns": named, "shard_rows": shard_rows}
    begin(output, settings)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    columns_shown = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns_shown, TextColumn("{task.fields[rate]}"), console=Console(stderr=True)) as progress:
        task = progress.add_task("rows", total=None, rate="")
        for number, shard in shards(rows, shard_rows, output, rank, size):
            write_shard(embedder, shard, number, output, named, id_column, batch_size)
            progress.advance(task, len(shard))
            speed = progress.tasks[0].speed
            progress.update(task, rate=f"{speed:.1f} rows/s" if speed else "")
    return output


def begin(output: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or check that an earlier run had the same."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / SETTINGS
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if other := [name for name in settings if earlier.get(name) != settings[name]]:
            raise ValueError(
                f"{path}: this folder was begun with another {', '.join(other)}: choose another output, or remove it."
            )
        return
    with replaced(path) as file:
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def shards(
    rows: Any, size: int, output: Path, rank: int, processes: int
) -> Iterator[tuple[int, list[tuple[int, dict[str, Any]]]]]:
    """The shards that are not there yet and that fall to this process: numbers and numbered rows."""
    number = 0
    while (output / VECTORS.format(number)).exists():
        number += 1
    remaining = iter(rows.skip(number * size))
    while True:
        wanted = number % processes == rank and not (output / VECTORS.format(number)).exists()
        shard = [(number * size + i, row if wanted else {}) for i, row in enumerate(islice(remaining, size))]
        if not shard:
            return
        if wanted:
            yield number, shard
        number += 1


def write_shard(
    embedder: Embedder,
    shard: Sequence[tuple[int, dict[str, Any]]],
    number: int,
    output: Path,
    columns: Mapping[str, str],
    id_column: str | None,
    batch_size: int,
) -> None:
    """Embed the rows of a shard; one that cannot be read in any of its modalities becomes an error."""
    import pyarrow
    from pyarrow import parquet

    kept: dict[str, list[Any]] = {name: [] for name in ("row", "id", "path", *columns)}
    errors: dict[str, list[Any]] = {name: [] for name in ("row", "id", "modality", "error")}
    for start in range(0, len(shard), batch_size):
        batch = shard[start : start + batch_size]
        vectors, wrong = embed_batch(embedder, [row for _, row in batch], columns)
        for i, (place, row) in enumerate(batch):
            path = next((p for c in columns.values() if (p := path_of(row[c]))), None)
            name = str(row[id_column] if id_column else row.get("__key__") or path or place)
            if i in wrong:
                modality, error = wrong[i]
                values = {"row": place, "id": name, "modality": modality, "error": error}
            else:
                values = {"row": place, "id": name, "path": path} | {m: vectors[m][i] for m in columns}
            for column, value in values.items():
                (errors if i in wrong else kept)[column].append(value)
    types = {"row": pyarrow.int64(), "id": pyarrow.string(), "path": pyarrow.string()}
    types |= {modality: pyarrow.list_(pyarrow.float32(), embedder.size) for modality in columns}
    if errors["row"]:
        with replaced(output / ERRORS.format(number)) as file:
            parquet.write_table(pyarrow.table(errors), file)
    with replaced(output / VECTORS.format(number)) as file:
        parquet.write_table(pyarrow.table(kept, pyarrow.schema(list(types.items()))), file)


def embed_batch(
    embedder: Embedder, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> tuple[dict[str, dict[int, Any]], dict[int, tuple[str, str]]]:
    """Vectors by modality and place in the batch, and what is wrong with the other rows."""
    vectors: dict[str, dict[int, Any]] = {}
    wrong: dict[int, tuple[str, str]] = {}
    for modality, column in columns.items():
        sources = [first(row[column]) if modality == "text" else row[column] for row in rows]
        found, errors = embedder.encode_readable(modality, sources)
        readable = [i for i in range(len(rows)) if i not in errors]
        vectors[modality] = dict(zip(readable, found, strict=True))
        wrong |= {i: (modality, error) for i, error in errors.items() if i not in wrong}
    return vectors, wrong


def first(texts: Any) -> Any:
    """Of several captions, the first."""
    return texts[0] if isinstance(texts, list) and texts else texts


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What `embed` wrote about itself.

    Raises:
        FileNotFoundError: the folder is not one that `embed` wrote.
    """
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is none: this is no folder of `hfvlm embed`.")
    return json.loads(path.read_text(encoding="utf-8"))


def read_vectors(folder: str | Path, modality: str) -> tuple[Index, dict[str, str]]:
    """The vectors of one modality as an index, and the paths of their media by id.

    Raises:
        ValueError: there are no such vectors.
    """
    from pyarrow import parquet

    index = Index()
    paths: dict[str, str] = {}
    for shard in sorted(Path(folder).glob(VECTORS.format(0).replace("00000", "*"))):
        table = parquet.read_table(shard)
        if modality not in table.column_names:
            raise ValueError(f"{folder}: holds vectors of {', '.join(table.column_names[3:])}, not of {modality}.")
        ids, column = table["id"].to_pylist(), table[modality].combine_chunks()
        if ids:
            index.add(column.flatten().to_numpy().reshape(len(ids), -1), ids)
        paths |= {name: path for name, path in zip(ids, table["path"].to_pylist(), strict=True) if path}
    return index, paths
