"""Rows of data sets, whose columns hold media that nothing has decoded yet."""

from collections.abc import Iterable, Mapping
from typing import Any

# The columns that hold a modality when nobody says; those of webdataset are named by the files' suffixes.
COLUMNS = {
    "image": ("image", "jpg", "jpeg", "png", "webp"),
    "video": ("video", "mp4"),
    "text": ("text", "caption", "captions", "txt"),
    "audio": ("audio", "wav", "flac", "mp3"),
    "depth": ("depth",),
    "thermal": ("thermal",),
    "imu": ("imu",),
}


def columns_by_name(columns: Iterable[str]) -> dict[str, str]:
    """The column of each modality that has one, by their usual names."""
    present = set(columns)
    found = {modality: next((c for c in names if c in present), None) for modality, names in COLUMNS.items()}
    return {modality: column for modality, column in found.items() if column is not None}


def load_rows(dataset: str, subset: str | None = None, *, split: str, streaming: bool = False) -> Any:
    """A data set that `datasets` reads, its media still encoded: a folder of media, tars, Parquet, a Hub id.

    Raises:
        ImportError: `datasets` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("Data sets are read with `datasets`: `pip install 'hfvlm[train]'`.") from error
    rows = load_dataset(dataset, subset, split=split, streaming=streaming)
    for name, feature in (rows.features or {}).items():
        if hasattr(feature, "decode"):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def path_of(value: Any) -> str | None:
    """Where a medium lies, if it says so."""
    if isinstance(value, Mapping):
        value = value.get("path")
    return value if isinstance(value, str) else None
