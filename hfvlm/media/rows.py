"""Rows of data sets, whose columns hold media that nothing has decoded yet."""

from collections.abc import Iterable, Mapping, Sequence
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


def are_several(sources: Any) -> bool:
    """Whether these are several sources, a list or a column of `datasets`; a tuple is one, a sound and its rate."""
    return isinstance(sources, Sequence) and not isinstance(sources, str | bytes | tuple)


def captions_of(value: Any) -> list[str]:
    """The captions of a row, which has one or several.

    Raises:
        ValueError: it has none.
    """
    captions = [value] if isinstance(value, str) else list(value or ())
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"text: a caption or a list of captions is needed, not {str(value)[:80]!r}.")
    return captions


def first_caption(value: Any) -> Any:
    """Of several captions the first; what is no list, as it is."""
    return value[0] if isinstance(value, list) and value else value


def path_of(value: Any) -> str | None:
    """Where a medium lies, if it says so."""
    if isinstance(value, Mapping):
        value = value.get("path")
    return value if isinstance(value, str) else None
