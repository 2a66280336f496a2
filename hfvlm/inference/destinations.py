"""Destinations of vectors: what a user names, and the store that is opened for it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hfvlm.checks.messages import shown
from hfvlm.inference.lance_store import LanceStore
from hfvlm.inference.qdrant_store import KEY, QdrantStore
from hfvlm.inference.stores import ParquetStore, Store

KINDS = ("parquet", "lancedb", "qdrant")
VECTORS = "vectors"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True)
class Destination:
    """Where vectors go.

    Args:
        kind: "parquet", files; "lancedb", a table in the output folder; "qdrant", a collection, on a server or, for
            some ten thousand rows, in the output folder.
        url: of a Qdrant server, as http://localhost:6333; its key is the environment variable QDRANT_API_KEY.
        collection: its name on the server; by default the output folder's.

    Raises:
        ValueError: the kind is unknown, the URL is none, or something is given that does not go with the kind.
    """

    kind: str = "parquet"
    url: str | None = None
    collection: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"to must be one of {', '.join(KINDS)}, not {shown(self.kind)}.")
        if self.url is not None and self.kind != "qdrant":
            raise ValueError(f"A url goes with to='qdrant' only, not with {self.kind}, which is a folder.")
        if self.collection is not None and self.url is None:
            raise ValueError("A collection is named on a Qdrant server only: give its url, too.")
        if self.url is not None:
            check_url(self.url)
        if self.collection is not None and not NAME.fullmatch(self.collection):
            raise ValueError(
                f"collection {shown(self.collection)}: a name has letters, digits, dots, dashes and underscores."
            )

    def settings(self, folder: Path) -> dict[str, Any]:
        """Return what a run's settings record of it.

        Raises:
            ValueError: the folder's name is none of a collection.
        """
        if self.url is None:
            return {"to": self.kind}
        collection = self.collection or folder.resolve().name
        if not NAME.fullmatch(collection):
            raise ValueError(f"{folder}: its name is none of a collection: name one with collection.")
        return {"to": self.kind, "url": self.url, "collection": collection}


def open_store(folder: Path, settings: Mapping[str, Any], url: str | None = None) -> Store:
    """Open the store of a folder of `embed`.

    Args:
        folder: the folder.
        settings: its `embed.json`.
        url: of the Qdrant server, as the user of this very call names it: a folder of others names none.

    Raises:
        ValueError: the settings name a server and the user does not, or the other way round, or an unknown kind.
        ImportError: the extra of the database is not installed.
    """
    kind, recorded = settings.get("to", "parquet"), settings.get("url")
    if kind not in KINDS:
        raise ValueError(f"{folder}/embed.json: to {shown(kind)} is none of {', '.join(KINDS)}.")
    if url is not None and recorded is None:
        raise ValueError(f"{folder}: its vectors are in the folder ({kind}): leave url out.")
    if recorded is not None and url is None:
        raise ValueError(f"{folder}: its vectors are in Qdrant at {shown(recorded)}: name it with url (--url).")
    if kind == "parquet":
        return ParquetStore(folder, VECTORS)
    if kind == "lancedb":
        return LanceStore(folder, VECTORS)
    if url is not None:
        check_url(url)
    return QdrantStore(folder, VECTORS, url, settings["collection"] if url else VECTORS)


def check_url(url: str) -> None:
    """Refuse what is no URL of a server, or one with a password, which would be written into the settings.

    Raises:
        ValueError: it is.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url {shown(url)} is none of a server: write http://localhost:6333.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"The url is of the server alone; its key is read from the environment variable {KEY}.")
