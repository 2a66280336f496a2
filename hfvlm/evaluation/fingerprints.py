"""Hashes of the rows that an evaluation reads: by content, wherever the files are."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Columns that hold no media: a text of them is a text, even if a file is called so.
PLAIN = ("text", "candidate", "label", "question", "answer", "answers", "subset", "objects", "box")


def fingerprint(columns: Mapping[str, Sequence[Any]]) -> str:
    """Hash columns by their names and the content of their values, in the order of the rows.

    A file counts by its bytes, not by its path: data that were moved have the same fingerprint, data of which a file
    was replaced have another. A file that is not there counts by its name.

    Args:
        columns: of media, as bytes, paths or rows with "bytes" and "path"; of texts, numbers and lists of these.
    """
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(f"{name} {len(columns[name])}\n".encode())
        for value in columns[name]:
            digest.update(value_digest(value, files=name not in PLAIN))
    return f"sha256:{digest.hexdigest()}"


def value_digest(value: Any, *, files: bool) -> bytes:
    """Return the SHA-256 of a value's kind and content; with `files`, a text that names a file counts by its bytes."""
    if isinstance(value, Mapping):
        if {"bytes", "path"} == value.keys():  # of which the path alone says nothing about the content
            return value_digest(value["path"] if value["bytes"] is None else value["bytes"], files=True)
        return value_digest(sorted(value.items()), files=files)
    if isinstance(value, list | tuple):
        return hashlib.sha256(b"".join([b"list", *(value_digest(part, files=files) for part in value)])).digest()
    if files and isinstance(value, str) and is_file(value):
        with Path(value).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    if isinstance(value, bytes):
        return hashlib.sha256(value).digest()
    return hashlib.sha256(f"{type(value).__name__} {value!r}".encode()).digest()


def is_file(text: str) -> bool:
    """Check whether a text is the path of a file."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a path, or with a null in it
        return False
