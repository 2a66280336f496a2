"""Whole data sets to Parquet shards of vectors, in a run that may be killed and started again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hfvlm.inference.embedder import Embedder
from hfvlm.inference.index import Index
from hfvlm.inference.shards import Columns, Row, append, named, run_shards
from hfvlm.media.rows import columns_by_name, first_caption, load_rows

SETTINGS, VECTORS = "embed.json", "vectors"
ABOUT = ("row", "id", "path", "caption")


def embed(  # noqa: PLR0913 (each says what the content is)
    source: str | Path,
    output: str | Path,
    model: str | Path,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    id_column: str | None = None,
    batch_size: int = 64,
    shard_rows: int = 4096,
    source_options: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Path:
    """Embed every row of a data set.

    The output holds `vectors-<n>.parquet` (the row's number, its id, the path of its medium where there is one, its
    caption where texts are embedded, and a vector for each modality), `errors-<n>.parquet` for the rows that could not
    be read, and `embed.json`, which says what was embedded by what. A shard appears when it is complete; started
    again, a run goes on after the shards that are there. Several processes (torchrun, accelerate) share the shards out
    among them.

    Args:
        source: a folder of media, webdataset tars, Parquet or a Hub id: what `datasets` reads.
        output: the folder.
        model: the model's folder or Hub id.
        split: of the data set.
        columns: {"image": "photo"}; by default every column whose name is known and whose modality the model knows.
        id_column: by default webdataset's `__key__`, or the medium's path, or the row's number.
        batch_size: rows that the model takes at a time.
        shard_rows: rows of a shard.
        source_options: by modality: {"audio": {"sampling_rate": 16000}, "thermal": {"limits": [10, 40]}}.
        **options: of `Embedder.from_pretrained`.

    Raises:
        ValueError: the output was made with other settings, no column holds what the model embeds, or there are
            options of a modality that is not embedded.
        ImportError: `datasets` is not installed.
    """
    output = Path(output)
    rows = load_rows(str(source), split=split, streaming=True)
    found = columns or columns_by_name(rows.features or next(iter(rows)))
    embedder = Embedder.from_pretrained(model, list(columns) if columns else None, **options)
    embedder.check_one_vector("A table of vectors")
    named_columns = {modality: column for modality, column in found.items() if modality in embedder.modalities}
    if not named_columns:
        raise ValueError(f"{source}: no column of it holds {', '.join(embedder.modalities)}: name them with columns.")
    settings = {
        "source": str(source),
        "split": split,
        "model": str(model),
        "columns": named_columns,
        "shard_rows": shard_rows,
    }
    given = {modality: dict(values) for modality, values in (source_options or {}).items()}
    if unused := [modality for modality in given if modality not in named_columns]:
        raise ValueError(f"Options of {unused[0]}, which is not embedded; {', '.join(named_columns)} is.")
    settings |= {"source_options": given} if given else {}

    def tables(shard: list[Row], _: int) -> tuple[Any, Columns]:
        return embed_shard(embedder, shard, named_columns, id_column, batch_size, given)

    run_shards(rows, output, settings, tables, settings_name=SETTINGS, name=VECTORS, shard_rows=shard_rows)
    return output


def embed_shard(
    embedder: Embedder,
    shard: list[Row],
    columns: Mapping[str, str],
    id_column: str | None,
    batch_size: int,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Any, Columns]:
    """The vectors of a shard's rows; one that cannot be read in any of its modalities becomes an error."""
    import pyarrow

    kept: Columns = {name: [] for name in ("row", "id", "path", "caption", *columns)}
    errors: Columns = {name: [] for name in ("row", "id", "modality", "error")}
    for start in range(0, len(shard), batch_size):
        batch = shard[start : start + batch_size]
        vectors, wrong = embed_batch(embedder, [row for _, row in batch], columns, options)
        for i, (place, row) in enumerate(batch):
            name, path = named(place, row, list(columns.values()), id_column)
            if i in wrong:
                modality, error = wrong[i]
                append(errors, {"row": place, "id": name, "modality": modality, "error": error})
            else:
                caption = first_caption(row[columns["text"]]) if "text" in columns else None
                about = {"row": place, "id": name, "path": path, "caption": caption}
                append(kept, about | {m: vectors[m][i] for m in columns})
    types = {"row": pyarrow.int64(), "id": pyarrow.string(), "path": pyarrow.string(), "caption": pyarrow.string()}
    types |= {modality: pyarrow.list_(pyarrow.float32(), embedder.size) for modality in columns}
    return pyarrow.table(kept, pyarrow.schema(list(types.items()))), errors


def embed_batch(
    embedder: Embedder,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, dict[int, Any]], dict[int, tuple[str, str]]]:
    """Vectors by modality and place in the batch, and what is wrong with the other rows."""
    vectors: dict[str, dict[int, Any]] = {}
    wrong: dict[int, tuple[str, str]] = {}
    for modality, column in columns.items():
        sources = [first_caption(row[column]) if modality == "text" else row[column] for row in rows]
        found, errors = embedder.encode_readable(modality, sources, **(options or {}).get(modality, {}))
        readable = [i for i in range(len(rows)) if i not in errors]
        vectors[modality] = dict(zip(readable, found, strict=True))
        wrong |= {i: (modality, error) for i, error in errors.items() if i not in wrong}
    return vectors, wrong


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What `embed` wrote about itself.

    Raises:
        FileNotFoundError: the folder is not one that `embed` wrote.
    """
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is none: this is no folder of `hfvlm embed`.")
    return json.loads(path.read_text(encoding="utf-8"))


def read_embedder(folder: str | Path, modalities: Sequence[str] | None = None, **options: Any) -> Embedder:
    """The model that made the vectors of a folder, for queries."""
    return Embedder.from_pretrained(read_settings(folder)["model"], modalities, **options)


def count_rows(folder: str | Path) -> tuple[int, int]:
    """How many rows of a folder have vectors, and how many are errors."""
    from pyarrow import parquet

    found = {VECTORS: 0, "errors": 0}
    for name in found:
        found[name] = sum(parquet.read_metadata(path).num_rows for path in Path(folder).glob(f"{name}-*.parquet"))
    return found[VECTORS], found["errors"]


def read_vectors(folder: str | Path, modality: str) -> tuple[Index, dict[str, str]]:
    """The vectors of one modality as an index, and the paths of their media by id.

    Raises:
        ValueError: there are no such vectors.
    """
    from pyarrow import parquet

    names: list[str] = []
    vectors: list[Any] = []
    paths: dict[str, str] = {}
    for shard in sorted(Path(folder).glob(f"{VECTORS}-*.parquet")):
        table = parquet.read_table(shard)
        if modality not in table.column_names:
            raise ValueError(f"{folder}: holds vectors of {', '.join(vector_columns(table))}, not of {modality}.")
        ids, column = table["id"].to_pylist(), table[modality].combine_chunks()
        if ids:
            vectors.append(column.flatten().to_numpy().reshape(len(ids), -1))
        names += ids
        paths |= {name: path for name, path in zip(ids, table["path"].to_pylist(), strict=True) if path}
    return Index(np.concatenate(vectors), names) if vectors else Index(), paths


def vector_columns(table: Any) -> list[str]:
    """The columns of a shard that hold vectors."""
    return [name for name in table.column_names if name not in ABOUT]


def read_captions(folder: str | Path) -> dict[str, str]:
    """The texts that were embedded, by id; of runs before texts were stored none."""
    from pyarrow import parquet

    captions: dict[str, str] = {}
    for shard in sorted(Path(folder).glob(f"{VECTORS}-*.parquet")):
        if "caption" in parquet.read_schema(shard).names:
            table = parquet.read_table(shard, columns=["id", "caption"])
            captions |= {name: text for name, text in zip(*table.to_pydict().values(), strict=True) if text}
    return captions
