"""The columns of a data set that a model is trained on."""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from hfvlm.media.rows import COLUMNS, columns_by_name

logger = logging.getLogger(__name__)

# Texts of these columns are names, and no captions.
NAMES = (
    "file_name", "filename", "path", "url", "id", "key", "__key__", "__url__", "hash", "sha256", "license", "licence"
)  # fmt: skip


def training_columns(
    rows: Any,
    given: Mapping[str, str] | None,
    *,
    needed: Collection[str],
    modalities: Collection[str],
    source: str,
) -> dict[str, str]:
    """Find the column of each modality: those that are given, and for others that are needed the ones with a usual
    name, or the only one that is possible.

    Args:
        rows: a data set of `datasets`.
        given: {"image": "photo"}; where these suffice they are all.
        needed: the modalities without which there is nothing to train on.
        modalities: those of the model.
        source: the data set's name, for errors.

    Raises:
        ValueError: a column is missing, or none can be found for a modality; listing the columns.
    """
    features = rows.features or dict.fromkeys(next(iter(rows)))
    given = dict(given or {})
    for modality, column in given.items():
        if modality not in COLUMNS:
            raise ValueError(f"columns: {modality!r} is no modality; there are {', '.join(COLUMNS)}.")
        if column not in features:
            raise ValueError(f"{source}: has no column {column!r} for {modality}; it has {described(features)}.")
    named = {modality: column for modality, column in columns_by_name(features).items() if modality in modalities}
    if given and not set(needed) - set(given):
        return given
    columns = named | given
    for modality in [name for name in needed if name not in columns]:
        columns[modality] = only_column(features, modality, columns.values(), source)
        logger.warning("%s: the column %r is taken for %s.", source, columns[modality], modality)
    return columns


def only_column(features: Mapping[str, Any], modality: str, taken: Iterable[str], source: str) -> str:
    """Find the one column that can hold a modality.

    Raises:
        ValueError: there are none or several.
    """
    free = [name for name in features if name not in taken and name.lower() not in NAMES]
    possible = [name for name in free if kind_of(features[name]) == modality]
    if len(possible) == 1:
        return possible[0]
    count = f"{len(possible)} columns may hold" if possible else "no column is known to hold"
    raise ValueError(
        f"{source}: {count} the {modality}; it has {described(features)}. Name it: columns.{modality}=COLUMN, or "
        f"--column {modality}=COLUMN."
    )


def kind_of(feature: Any) -> str | None:
    """Return the modality that a feature of `datasets` can hold."""
    inner = getattr(feature, "feature", feature)  # of a list
    if type(inner).__name__ in ("Image", "Audio", "Video"):
        return type(inner).__name__.lower()
    return "text" if getattr(inner, "dtype", None) in ("string", "large_string") else None


def described(features: Mapping[str, Any]) -> str:
    """List the columns with their kinds."""
    kinds = ((name, kind_of(feature) or getattr(feature, "dtype", "")) for name, feature in features.items())
    return ", ".join(f"{name} ({kind})" if kind else name for name, kind in kinds)
