"""Whole data sets to Parquet shards of vectors, in a run that may be killed and started again."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hfvlm.checks.ranges import check_integer
from hfvlm.inference.embedder import Embedder
from hfvlm.inference.index import Index
from hfvlm.inference.pins import pinned_data, processor_hash, tower_hashes
from hfvlm.inference.shards import Row, Run, Tables, absolute, earlier_data, named, open_rows, read_json, run_shards
from hfvlm.media.folders import MODALITY
from hfvlm.media.rows import first_caption
from hfvlm.versions import __version__

SETTINGS, VECTORS = "embed.json", "vectors"
ABOUT = ("row", "id", "path", "caption")


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
    **options: Any,
) -> Path:
    """Embed every row of a data set.

    The output holds `vectors-<n>.parquet` (the row's number, its id, the path of its media file where there is one,
    its caption where texts are embedded, and a vector for each modality), `errors-<n>.parquet` for the rows that could
    not be read or have no finite vector, and `embed.json` and `files.json`, which record the model, the settings and
    the files. A shard appears when it is complete; started again, a run goes on after the shards that exist, if the
    files, the weights and all settings are as they were. Several processes (torchrun, accelerate) share the shards.

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
        **options: of `Embedder.from_pretrained`.

    Raises:
        ValueError: the output was made of other files, by other weights or with other settings, or lies in the
            source; no column holds what the model embeds; there are options of a modality that is not embedded; or a
            number is out of its range.
        ImportError: `datasets` is not installed.
    """
    check_integer("batch_size", batch_size)
    check_integer("shard_rows", shard_rows)
    output, source = Path(output), absolute(source)
    rows, found = open_rows(source, split, columns, id_column)
    embedder = Embedder.from_pretrained(model, list(columns) if columns else None, **options)
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
        "weights": tower_hashes(embedder.model), "processor": processor_hash(embedder.processor),
    }  # fmt: skip
    data = pinned_data(source, split, earlier_data(output))
    about = {"model": absolute(model), "hfvlm": __version__}
    run = Run(output, VECTORS, SETTINGS, shard_rows, settings, data, about)
    run_shards(rows, run, Shards(embedder, known, id_column, batch_size, by_modality).tables)
    return output


@dataclass(frozen=True)
class Shards:
    """The embedding of rows, shard by shard; arguments as `embed`."""

    embedder: Embedder
    columns: Mapping[str, str]
    id_column: str | None
    batch_size: int
    source_options: Mapping[str, Mapping[str, Any]]

    def tables(self, shard: Sequence[Row], _: int) -> Tables:
        """Return the vectors of a shard's rows, and its errors: a row with a modality that cannot be read is one."""
        import pyarrow

        embedded: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        media = [column for modality, column in self.columns.items() if modality != "text"]
        for start in range(0, len(shard), self.batch_size):
            batch = shard[start : start + self.batch_size]
            vectors, wrong = self.batch([row for _, row in batch])
            for i, (number, row) in enumerate(batch):
                name, path = named(number, row, media, self.id_column)
                if i in wrong:
                    modality, error = wrong[i]
                    errors.append({"row": number, "id": name, "modality": modality, "error": error})
                else:
                    text = self.columns.get("text")
                    caption = None if text is None else first_caption(row.get(text))
                    about = {"row": number, "id": name, "path": path, "caption": caption}
                    embedded.append(about | {m: vectors[m].get(i) for m in vectors})
        types = {"row": pyarrow.int64()} | dict.fromkeys(("id", "path", "caption"), pyarrow.string())
        types |= {modality: pyarrow.list_(pyarrow.float32(), self.embedder.size) for modality in self.columns}
        return pyarrow.Table.from_pylist(embedded, pyarrow.schema(list(types.items()))), errors

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[int, Any]], dict[int, tuple[str, str]]]:
        """Return vectors by modality and position in the batch, and what is wrong with the other rows."""
        vectors: dict[str, dict[int, Any]] = {}
        known = (None, *self.columns.values())  # of a folder of several kinds, those that are embedded
        kinds = {i: str(row[MODALITY]) for i, row in enumerate(rows) if row.get(MODALITY) not in known}
        wrong = {i: (kind, "nothing of this kind is embedded.") for i, kind in kinds.items()}
        for modality, column in self.columns.items():
            positions = [i for i, row in enumerate(rows) if row.get(MODALITY) in (None, column)]
            given = [rows[i].get(column) for i in positions]
            sources = [first_caption(value) for value in given] if modality == "text" else given
            options = self.source_options.get(modality, {})
            found, errors = self.embedder.encode_readable(modality, sources, **options)
            readable = [position for i, position in enumerate(positions) if i not in errors]
            vectors[modality] = dict(zip(readable, found, strict=True))
            wrong |= {positions[i]: (modality, error) for i, error in errors.items() if positions[i] not in wrong}
        return vectors, wrong


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


def count_rows(folder: str | Path) -> tuple[int, int]:
    """Count the rows of a folder that have vectors, and those that are errors."""
    from pyarrow import parquet

    found: Counter[str] = Counter()
    for path in Path(folder).glob("*-*.parquet"):
        found[path.name.split("-")[0]] += parquet.read_metadata(path).num_rows
    return found[VECTORS], found["errors"]


def read_vectors(folder: str | Path, modality: str) -> tuple[Index, dict[str, str]]:
    """Read the vectors of one modality as an index, and the paths of their media by id.

    Raises:
        ValueError: there are no such vectors.
        FileNotFoundError: the folder is not one that `embed` wrote.
    """
    from pyarrow import parquet

    names: list[str] = []
    vectors: list[Any] = []
    paths: dict[str, str] = {}
    for shard in sorted(Path(folder).glob(f"{VECTORS}-*.parquet")):
        table = parquet.read_table(shard)
        if modality not in table.column_names:
            raise ValueError(f"{folder}: holds vectors of {', '.join(vector_columns(table))}, not of {modality}.")
        table = table.filter(table[modality].is_valid())
        ids, column = table["id"].to_pylist(), table[modality].combine_chunks()
        if ids:
            vectors.append(column.flatten().to_numpy().reshape(len(ids), -1))
        names += ids
        paths |= {name: path for name, path in zip(ids, table["path"].to_pylist(), strict=True) if path}
    if not vectors:
        read_settings(folder)
        _, errors = count_rows(folder)
        why = (
            f"all {errors} rows are errors, see errors-*.parquet" if errors else "the run wrote no shard: embed again"
        )
        raise ValueError(f"{folder}: holds no vector of {modality}: {why}.")
    return Index(np.concatenate(vectors), names), paths


def vector_columns(table: Any) -> list[str]:
    """Return the columns of a shard that hold vectors."""
    return [name for name in table.column_names if name not in ABOUT]


def read_captions(folder: str | Path) -> dict[str, str]:
    """Read the texts that were embedded, by id; none of runs that did not store them."""
    from pyarrow import parquet

    captions: dict[str, str] = {}
    for shard in sorted(Path(folder).glob(f"{VECTORS}-*.parquet")):
        if "caption" in parquet.read_schema(shard).names:
            table = parquet.read_table(shard, columns=["id", "caption"])
            captions |= {name: text for name, text in zip(*table.to_pydict().values(), strict=True) if text}
    return captions
