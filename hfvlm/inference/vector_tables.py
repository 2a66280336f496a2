"""Rows of a data set to tables of vectors and of errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfvlm.inference.embedder import Embedder
from hfvlm.inference.shards import Row, Tables, named
from hfvlm.inference.stores import schema_of
from hfvlm.media.folders import MODALITY
from hfvlm.media.rows import first_caption


@dataclass(frozen=True)
class VectorTables:
    """The embedding of rows, shard by shard; arguments as of `hfvlm.inference.embed.embed`."""

    embedder: Embedder
    columns: Mapping[str, str]
    id_column: str | None
    batch_size: int
    source_options: Mapping[str, Mapping[str, Any]]

    def __call__(self, shard: Sequence[Row], _: int) -> Tables:
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
        schema = schema_of(dict.fromkeys(self.columns, self.embedder.size))
        return pyarrow.Table.from_pylist(embedded, schema), errors

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
