"""Folders of audio, video, depth and other files, or of several kinds, as rows; `datasets` reads them only in part."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hfvlm.media.errors import MediaError

SUFFIXES = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".wma"),
    "video": (".mp4", ".mkv", ".mov", ".avi", ".webm", ".mpeg", ".mpg", ".m4v"),
    "array": (".npy",),
}
KINDS = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
# The name of a folder that fixes the kind of its files, whatever their format.
SENSORS = {
    "depth": (*SUFFIXES["image"], ".npy"),
    "thermal": (*SUFFIXES["image"], ".npy"),
    "imu": (".npy", ".csv"),
}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Files whose rows `datasets` reads; a folder that has them is its.
TABLES = (".parquet", ".arrow", ".tar", ".zip", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".hdf5", ".h5", ".lance")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval"),
}
# The column with the modality of each row of a folder of several kinds.
MODALITY = "__modality__"


class MediaFolder:
    """The media files of a folder, by name.

    Args:
        root: the folder; hidden files in it are passed over.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)

    @cached_property
    def files(self) -> list[Path]:
        """All files, in the order of their paths."""
        inside = (path for path in self.root.rglob("*") if path.is_file())
        return sorted(p for p in inside if not any(x.startswith(".") for x in p.relative_to(self.root).parts))

    @property
    def needed(self) -> bool:
        """Whether the folder holds files that `datasets` does not read, and none that it reads as tables."""
        kinds = {self.kind(path) for path in self.files} - {None}
        tables = any(path.suffix.lower() in TABLES and self.kind(path) is None for path in self.data)
        return not tables and bool(kinds - {"image"})

    @cached_property
    def data(self) -> list[Path]:
        """The files that are no metadata."""
        return [path for path in self.files if path.name not in METADATA]

    def kind(self, path: Path) -> str | None:
        """Return the column that a file belongs to; None for none."""
        suffix = path.suffix.lower()
        for name in (self.root.name, *path.relative_to(self.root).parts[:-1]):
            if suffix in SENSORS.get(name.lower(), ()):
                return name.lower()
        return KINDS.get(suffix)

    def of_split(self, split: str) -> list[Path]:
        """Return the files of a split: those in a folder of its name, or, where no folder is called as a split, all.

        Raises:
            ValueError: the folder has no such split.
        """
        folders = {path.relative_to(self.root).parts[0].lower() for path in self.files if path.parent != self.root}
        there = {name: [x for x in names if x in folders] for name, names in SPLITS.items()}
        if not any(there.values()):
            if split != "train":
                raise ValueError(f"{self.root}: has no split {split!r}; all of it is 'train'.")
            return self.files
        if not there.get(split):
            known = ", ".join(name for name, names in there.items() if names)
            raise ValueError(f"{self.root}: has no split {split!r}; it has {known}.")
        return [path for path in self.files if path.relative_to(self.root).parts[0].lower() in there[split]]

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield a row for each file, or for each line of the metadata; a file is `{"path": ..., "bytes": None}`.

        Raises:
            ValueError: there is no such split, or metadata name no files.
            MediaError: metadata cannot be read.
        """
        files = self.of_split(split)
        metadata = [path for path in files if path.name in METADATA]
        if metadata:
            for path in metadata:
                yield from self.described(path)
            return
        known = [(path, kind) for path in files if (kind := self.kind(path)) is not None]
        labels = self.labels(known)
        several = len({kind for _, kind in known}) > 1
        for path, kind in known:
            row: dict[str, Any] = {kind: {"path": str(path), "bytes": None}}
            row |= {MODALITY: kind} if several else {}
            yield row | ({"label": path.parent.name} if labels else {})

    @staticmethod
    def labels(known: Sequence[tuple[Path, str]]) -> list[str]:
        """Return the names of the folders of files of one kind, where these are classes: several, at one depth."""
        names = {path.parent.name for path, _ in known}
        depths = {len(path.parts) for path, _ in known}
        one = len({kind for _, kind in known}) == 1
        return sorted(names) if one and len(names) > 1 and len(depths) == 1 else []

    def described(self, metadata: Path) -> Iterator[dict[str, Any]]:
        """Yield rows of one metadata file, whose `file_name` and `..._file_name` are relative to its folder."""
        for values in read_metadata(metadata):
            row: dict[str, Any] = {}
            for name, value in values.items():
                if name != "file_name" and not name.endswith("_file_name"):
                    row[name] = value
                    continue
                path = None if value is None else metadata.parent / str(value)
                column = name.removesuffix("file_name").removesuffix("_") or (self.kind(path) if path else None)
                if column is None:
                    raise ValueError(
                        f"{metadata}: file_name {value!r} is of no known kind: call its column as in audio_file_name."
                    )
                row[column] = None if path is None else {"path": str(path), "bytes": None}
            if not any(name.endswith("file_name") for name in values):
                raise ValueError(f"{metadata}: has no column file_name.")
            yield row

    def dataset(self, split: str) -> Any:
        """Return the rows of a split as a `datasets.Dataset`.

        Raises:
            ValueError: there is nothing in the split.
        """
        import datasets

        rows = list(self.rows(split))
        if not rows:
            raise ValueError(f"{self.root}: its split {split!r} holds no media.")
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
        if labels := sorted({row["label"] for row in rows if isinstance(row.get("label"), str)}):
            described = any(path.name in METADATA for path in self.files)
            table = table if described else table.cast_column("label", datasets.ClassLabel(names=labels))
        return table

    def unknown(self) -> Counter[str]:
        """Count the files that belong to no column, by suffix."""
        return Counter(path.suffix.lower() or path.name for path in self.data if self.kind(path) is None)


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metadata file.

    Raises:
        MediaError: it is damaged; the message names it.
    """
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, OSError) as error:
        raise MediaError(f"{path}: damaged ({error}).") from error
    if not all(isinstance(row, dict) for row in rows):
        raise MediaError(f'{path}: each line must be an object, as {{"file_name": ...}}.')
    return rows
