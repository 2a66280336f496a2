"""Whole data sets to shards of vectors, in a run that may be killed and started again."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from hfvlm.checks.ranges import check_integer
from hfvlm.inference.cluster import Cluster, Recipe, embed_on
from hfvlm.inference.destinations import Destination, open_store
from hfvlm.inference.embedder import Embedder
from hfvlm.inference.index import Index
from hfvlm.inference.pins import pinned_data, processor_hash, tower_hashes
from hfvlm.inference.shards import Run, absolute, earlier_data, open_rows, processes, read_json, run_shards
from hfvlm.inference.stores import Store, matrix
from hfvlm.inference.vector_tables import VectorTables
from hfvlm.versions import __version__

SETTINGS = "embed.json"


def embed(  # noqa: PLR0913 (each defines the content)
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
    to: str | Destination = "parquet",
    cluster: Cluster | None = None,
    **options: Any,
) -> Path:
    """Embed every row of a data set.

    The output holds `vectors-<n>.parquet` (the row's number, its id, the path of its media file where there is one,
    its caption where texts are embedded, and a vector for each modality), `errors-<n>.parquet` for the rows that could
    not be read or have no finite vector, and `embed.json` and `files.json`, which record the model, the settings and
    the files. A shard appears when it is complete; started again, a run goes on after the shards that exist, if the
    files, the weights and all settings are as they were. Several processes (torchrun, accelerate) share the shards.
    Sent to a database, the same rows are in its table, and `vectors-<n>.json` counts those of a complete shard.

    Of a folder of several kinds of media each row has the vector of its own kind, and null for the others.

    Args:
        source: a folder of media, webdataset tars, Parquet or a Hub id: what `hfvlm.media.rows.load_rows` reads.
        output: the folder.
        model: the model's folder or Hub id.
        split: of the data set.
        columns: {"image": "photo"}; by default every column whose name is known and whose modality the model knows.
        id_column: by default webdataset's `__key__`, or the media file's path, or the row's number.
        batch_size: rows that the model takes at a time.
        shard_rows: rows of a shard.
        source_options: of the processor, by modality: {"audio": {"sampling_rate": 16000}}.
        to: "parquet", "lancedb" or "qdrant", or a `Destination` with the server of a Qdrant.
        cluster: actors of Ray Data that embed, instead of this process; the files and vectors are the same.
        **options: of `Embedder.from_pretrained`.

    Raises:
        ValueError: the output was made of other files, by other weights or with other settings, or lies in the
            source; no column holds what the model embeds; there are options of a modality that is not embedded; a
            number is out of its range; or several processes were started for a database or a cluster.
        ImportError: `datasets`, or what the destination or the cluster needs, is not installed.
        RuntimeError: actors of the cluster died again and again.
    """
    check_integer("batch_size", batch_size)
    check_integer("shard_rows", shard_rows)
    output, source, model = Path(output), absolute(source), absolute(model)
    to = Destination(to) if isinstance(to, str) else to
    place = to.settings(output)
    store = open_store(output, place, to.url)
    if processes() > 1 and (cluster is not None or to.kind != "parquet"):
        raise ValueError(
            "Several processes share Parquet shards only: start one, which for many GPUs may have a cluster of Ray."
        )
    here = options if cluster is None else cluster.here(options)
    rows, found = open_rows(source, split, columns, id_column)
    modalities = list(columns) if columns else None
    embedder = Embedder.from_pretrained(model, modalities, **here)
    embedder.check_one_vector("A table of vectors")
    known = {modality: column for modality, column in found.items() if modality in embedder.modalities}
    if not known:
        raise ValueError(f"{source}: no column of it holds {', '.join(embedder.modalities)}: name them with columns.")
    if Path(source).is_dir() and output.resolve().is_relative_to(source):
        raise ValueError(f"{output}: lies in the folder that is embedded, {source}; choose an output outside of it.")
    by_modality = {name: dict(given) for name, given in (source_options or {}).items()}
    if foreign := sorted(set(by_modality) - set(known)):
        raise ValueError(f"source_options are given for {', '.join(foreign)}, which is not embedded.")
    settings = {
        "source": source, "split": split, "columns": known, "id_column": id_column, "shard_rows": shard_rows,
        "source_options": by_modality, "dtype": str(embedder.model.dtype).removeprefix("torch."),
        "weights": tower_hashes(embedder.model), "processor": processor_hash(embedder.processor), **place,
    }  # fmt: skip
    data = pinned_data(source, split, earlier_data(output))
    run = Run(output, store, SETTINGS, shard_rows, settings, data, {"model": model, "hfvlm": __version__})
    how = (known, id_column, batch_size, by_modality)
    if cluster is None:
        run_shards(rows, run, VectorTables(embedder, *how))
    else:
        del embedder
        embed_on(cluster, run, Recipe(model, modalities, options, settings["weights"], how))
    return output


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Read the settings of a run of `embed`.

    Raises:
        FileNotFoundError: the folder is not one that `embed` wrote.
        ValueError: the file is damaged.
    """
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is none: this is no folder of `hfvlm embed`.")
    return read_json(path)


def read_embedder(folder: str | Path, modalities: Sequence[str] | None = None, **options: Any) -> Embedder:
    """Load the model that embedded a folder's vectors, for queries.

    Raises:
        ValueError: its weights are others by now.
    """
    settings = read_settings(folder)
    options = {"dtype": settings["dtype"]} | options if "dtype" in settings else options
    embedder = Embedder.from_pretrained(settings["model"], modalities, **options)
    made, now = settings.get("weights", {}), tower_hashes(embedder.model)
    if any(made[name] != now[name] for name in made.keys() & now.keys()):
        raise ValueError(f"{settings['model']}: its weights are not those that {folder} was embedded by: embed again.")
    return embedder


def open_vectors(folder: str | Path, modality: str, url: str | None = None) -> Store:
    """Open the store of a folder's vectors, for `hfvlm.inference.search.nearest_rows`; close it afterwards.

    Args:
        folder: one that `embed` wrote.
        modality: of the vectors.
        url: of the Qdrant server that has them, if one has.

    Raises:
        FileNotFoundError: the folder is not one that `embed` wrote.
        ValueError: there are no such vectors, or they are on a server that is not named, or on none that is.
        ImportError: the extra of the database is not installed.
    """
    store = open_store(Path(folder), read_settings(folder), url)
    try:
        known = store.sizes()
        if not known:
            raise nothing(folder, modality)
        if modality not in known:
            raise ValueError(f"{folder}: holds vectors of {', '.join(known)}, not of {modality}.")
    except BaseException:
        store.close()
        raise
    return store


def count_rows(folder: str | Path) -> tuple[int, int]:
    """Count the rows of a folder that have vectors, and those that are errors."""
    from pyarrow import parquet

    settings = read_settings(folder)
    errors = Path(folder).glob("errors-*.parquet")
    return open_store(Path(folder), settings, settings.get("url")).count(), sum(
        parquet.read_metadata(path).num_rows for path in errors
    )


def read_vectors(folder: str | Path, modality: str, url: str | None = None) -> tuple[Index, dict[str, str]]:
    """Read the vectors of one modality as an index in memory, and the paths of their media by id.

    Args:
        folder: one that `embed` wrote.
        modality: of the vectors.
        url: of the Qdrant server that has them, if one has.

    Raises:
        ValueError: there are no such vectors.
        FileNotFoundError: the folder is not one that `embed` wrote.
    """
    numbers: list[int] = []
    names: list[str] = []
    vectors: list[np.ndarray] = []
    paths: dict[str, str] = {}
    with closing(open_vectors(folder, modality, url)) as store:
        for table in store.tables(["row", "id", "path", modality]):
            table = table.filter(table[modality].is_valid())
            ids = table["id"].to_pylist()
            if ids:
                vectors.append(matrix(table[modality]))
            numbers += table["row"].to_pylist()
            names += ids
            paths |= {name: path for name, path in zip(ids, table["path"].to_pylist(), strict=True) if path}
    if not vectors:
        raise nothing(folder, modality)
    order = np.argsort(numbers, kind="stable")  # databases have one of their own
    return Index(np.concatenate(vectors)[order], [names[i] for i in order]), paths


def read_captions(folder: str | Path, url: str | None = None) -> dict[str, str]:
    """Read the texts that were embedded, by id; none of runs that did not store them."""
    captions: dict[str, str] = {}
    with closing(open_store(Path(folder), read_settings(folder), url)) as store:
        for table in store.tables(["id", "caption"]):
            if "caption" in table.column_names:
                captions |= {name: text for name, text in zip(*table.to_pydict().values(), strict=True) if text}
    return captions


def nothing(folder: str | Path, modality: str) -> ValueError:
    """Return the error of a folder without vectors."""
    _, errors = count_rows(folder)
    why = f"all {errors} rows are errors, see errors-*.parquet" if errors else "the run wrote no shard: embed again"
    return ValueError(f"{folder}: holds no vector of {modality}: {why}.")
