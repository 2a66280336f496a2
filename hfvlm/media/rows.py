"""Rows of data sets, whose columns hold encoded media."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hfvlm.media.errors import MediaError
from hfvlm.media.folders import MediaFolder
from hfvlm.media.sources import import_extra

logger = logging.getLogger(__name__)
# Errors of readers for damaged or missing sources; errors in code, as KeyError, pass through.
UNREADABLE = (MediaError, ValueError, OSError, EOFError, SyntaxError)

# Usual columns of each modality; those of webdataset are named by the files' suffixes.
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
    """Return the column of each modality that has one, by their usual names."""
    present = set(columns)
    found = {modality: next((c for c in names if c in present), None) for modality, names in COLUMNS.items()}
    return {modality: column for modality, column in found.items() if column is not None}


def load_rows(dataset: str, subset: str | None = None, *, split: str, streaming: bool = False) -> Any:
    """Load a data set with its media still encoded: a folder of media, tars, Parquet, a Hub id.

    Images in folders, tars and tables are read by `datasets`; folders of audio, video, depth and of several kinds by
    `MediaFolder`. Nothing is decoded, so that no decoder of `datasets` is needed.

    Raises:
        ImportError: `datasets` is not installed.
        FileNotFoundError: there is no such data set, here or on the Hub.
        ValueError: there is no such split, or a file is damaged.
    """
    datasets = import_extra("datasets", "train", "Reading data sets")
    folder = media_folder(dataset)
    if folder is not None:
        if unknown := folder.unknown():
            counts = ", ".join(f"{count} of {suffix}" for suffix, count in sorted(unknown.items())[:5])
            logger.warning("%s: files of no known kind are passed over: %s.", dataset, counts)
        rows = folder.dataset(split)
        return rows.to_iterable_dataset() if streaming else rows
    # `datasets` takes some relative names, as "text" and "json", for readers of its own.
    place = str(Path(dataset).absolute()) if Path(dataset).exists() else dataset
    try:
        return read_by_datasets(datasets.load_dataset, place, subset, split, streaming=streaming)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{dataset}: {error.__cause__ or error}") from error
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        if Path(dataset).exists():
            raise
        raise FileNotFoundError(f"{dataset}: no folder or file here, and not found on the Hub: {error}") from error


def read_by_datasets(load_dataset: Any, dataset: str, subset: str | None, split: str, *, streaming: bool) -> Any:
    """Load a data set by `datasets.load_dataset`, with its media still encoded."""
    stream = load_dataset(dataset, subset, split=split, streaming=True)
    if stream.features is None:
        return stream if streaming else load_dataset(dataset, subset, split=split)
    if streaming:
        return stream.cast(encoded(stream.features))
    # Audio would be encoded again on the way to the cache.
    options = {"features": without_audio(stream.features)} if has_audio(stream.features) else {}
    return undecoded(load_dataset(dataset, subset, split=split, **options))


def media_folder(dataset: str | Path) -> MediaFolder | None:
    """Return the folder of media if `datasets` does not read it, else None."""
    if not Path(dataset).is_dir():
        return None
    folder = MediaFolder(dataset)
    return folder if folder.needed else None


def undecoded(rows: Any) -> Any:
    """Return a data set whose media columns give bytes and paths; anything but a data set of `datasets`, or one with
    a format or a transform of its own, as it is."""
    features = getattr(rows, "features", None)
    if features is None or not hasattr(rows, "cast") or (getattr(rows, "format", None) or {}).get("type") is not None:
        return rows
    wanted = encoded(features)
    return rows if wanted == features else rows.cast(wanted)


def encoded(feature: Any) -> Any:
    """Return the features of a data set with `decode` off for all media, also in lists and structures."""
    import datasets

    if isinstance(feature, datasets.Audio):
        return {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    if hasattr(feature, "decode"):
        return replace(feature, decode=False)
    if isinstance(feature, Mapping):
        return type(feature)({name: encoded(inner) for name, inner in feature.items()})  # type: ignore[call-arg]
    if isinstance(feature, list):
        return [encoded(inner) for inner in feature]
    if isinstance(feature, datasets.List):
        return replace(feature, feature=encoded(feature.feature))
    return feature


def without_audio(features: Any) -> Any:
    """Return the features that keep a data set from encoding audio; tars of webdataset hold bare bytes."""
    import datasets

    bare = "__key__" in features
    columns = {
        name: datasets.Value("binary") if bare and isinstance(feature, datasets.Audio) else encoded(feature)
        for name, feature in features.items()
    }
    return datasets.Features(columns)


def has_audio(feature: Any) -> bool:
    """Whether any of the features is audio."""
    import datasets

    inner = feature.values() if isinstance(feature, Mapping) else feature if isinstance(feature, list) else ()
    inner = [feature.feature] if isinstance(feature, datasets.List) else inner
    return isinstance(feature, datasets.Audio) or any(map(has_audio, inner))


def are_several(sources: Any) -> bool:
    """Whether these are several sources, a list or a column of `datasets`; a tuple is one, audio and its rate."""
    return isinstance(sources, Sequence) and not isinstance(sources, str | bytes | tuple)


def captions_of(value: Any) -> list[str]:
    """Return the captions of a row, which has one or several.

    Raises:
        ValueError: it has none.
    """
    captions = [value] if isinstance(value, str) else list(value or ())
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"text: a caption or a list of captions is needed, not {str(value)[:80]!r}.")
    return captions


def first_caption(value: Any) -> Any:
    """Return the first of several captions; anything but a list as it is."""
    return value[0] if isinstance(value, list) and value else value


def path_of(value: Any) -> str | None:
    """Return the path of a source, if it has one."""
    if isinstance(value, Mapping):
        value = value.get("path")
    return value if isinstance(value, str) else None
