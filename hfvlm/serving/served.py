"""What is served: vectors that are searched, a model that embeds, a model that chats."""

import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from hfvlm.checks.messages import listed
from hfvlm.inference.index import Index
from hfvlm.inference.search import query_vector
from hfvlm.inference.zero_shot import ZeroShotClassifier
from hfvlm.media.folders import KINDS
from hfvlm.media.sources import THREADS
from hfvlm.serving.conversations import Conversations
from hfvlm.serving.errors import RequestError, refusing
from hfvlm.serving.sharing import SharedEmbedder

Sources = Mapping[str, Sequence[Any]]
# Of which a small image is drawn.
DRAWN = ("image", "depth", "thermal")
PLAYED = ("image", "audio", "video")
CLASSIFIERS = 16


def is_drawn(modality: str, path: Path) -> bool:
    """Check whether a small image is drawn of a row's file: of its modality, or of an image with a caption."""
    return modality in DRAWN or KINDS.get(path.suffix.lower()) == "image"


@dataclass(frozen=True)
class Table:
    """The vectors of one modality, and the files of their rows."""

    modality: str
    index: Index
    paths: Mapping[str, str]
    captions: Mapping[str, str]

    def hit(self, row: int, score: float) -> dict[str, Any]:
        """Describe a row that was found."""
        name = str(self.index.ids[row])
        path = self.file(row)
        kind = None if path is None else KINDS.get(path.suffix.lower())
        return {
            "row": row,
            "id": name,
            "score": score,
            "text": self.captions.get(name),
            "kind": kind,
            "thumbnail": f"/thumbnail/{self.modality}/{row}" if path and is_drawn(self.modality, path) else None,
            "media": f"/media/{self.modality}/{row}" if kind in PLAYED else None,
        }

    def file(self, row: int) -> Path | None:
        """Return the file of a row; None where it has none, or it is gone."""
        if not 0 <= row < len(self.index) or (path := self.paths.get(str(self.index.ids[row]))) is None:
            return None
        try:
            return Path(path) if Path(path).is_file() else None
        except (OSError, ValueError):  # no name of a file
            return None


@dataclass
class Served:
    """What a server answers from.

    Args:
        name: of the folder.
        embedder: of the model that embeds, if there is one.
        tables: vectors by modality.
        chats: of the model that chats, if there is one.
        options: of the processor, by modality.
    """

    name: str
    embedder: SharedEmbedder | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)
    chats: Conversations | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.classifier = lru_cache(CLASSIFIERS)(self.new_classifier)
        self.decoding = BoundedSemaphore(THREADS)

    def about(self) -> dict[str, Any]:
        """Describe what is served."""
        return {
            "name": self.name,
            "model": type(self.embedder.model).__name__ if self.embedder else None,
            "modalities": list(self.embedder.modalities) if self.embedder else [],
            "indexed": {modality: len(table.index) for modality, table in self.tables.items()},
            "chat_model": type(self.chats.model).__name__ if self.chats else None,
            "chat_modality": self.chats.modality if self.chats else None,
        }

    def needed_embedder(self) -> SharedEmbedder:
        """Return the embedder.

        Raises:
            RequestError: there is none.
        """
        if self.embedder is None:
            raise RequestError(
                f"{self.name} chats, and embeds nothing: start `hfvlm serve` with a model that embeds.", 404
            )
        return self.embedder

    def needed_chats(self) -> Conversations:
        """Return the conversations.

        Raises:
            RequestError: no model chats.
        """
        if self.chats is None:
            raise RequestError(
                "No model that chats is served: start `hfvlm serve` with one, or with --chat MODEL.", 404
            )
        return self.chats

    def table(self, among: str | None) -> Table:
        """Return the vectors of a modality, by default of images, or the first ones.

        Raises:
            RequestError: there are no such vectors.
        """
        if not self.tables:
            raise RequestError("No index is served: start `hfvlm serve` with a folder of `hfvlm embed`.", 404)
        among = among or ("image" if "image" in self.tables else next(iter(self.tables)))
        if among not in self.tables:
            raise RequestError(f"among: there are vectors of {listed(self.tables)}, not of {among!r}.")
        return self.tables[among]

    def options_of(self, sources: Sources) -> dict[str, dict[str, Any]]:
        """Return the processor's options for modalities of which there are sources."""
        return {modality: dict(given) for modality, given in self.options.items() if modality in sources}

    def embed(self, sources: Sources) -> dict[str, Any]:
        """Embed sources by modality: `(N, D)` each, of unit length, as lists.

        Raises:
            RequestError: a source cannot be read, the model does not embed its modality, or there is none.
        """
        embedder = self.needed_embedder()
        options = self.options_of(sources)
        with refusing():
            embedder.check(list(sources))
            given: dict[str, Any] = {modality: list(own) for modality, own in sources.items()}
            found = embedder.encode(**given, options=options)
        found = found if len(given) > 1 else dict.fromkeys(given, found)
        return {modality: vectors.tolist() for modality, vectors in found.items()}

    def search(self, sources: Sources, among: str | None, k: int) -> dict[str, Any]:
        """Find the nearest rows to the sum of the sources; a text ends in `::0.5` to weigh it.

        Raises:
            RequestError: as `embed`, or there are no vectors to search.
        """
        embedder, table = self.needed_embedder(), self.table(among)
        with refusing():
            embedder.check(list(sources))
            vector = query_vector(embedder, sources, self.options_of(sources))
            scores, rows = table.index.nearest(table.index.checked(vector[None]), min(k, len(table.index)))
        hits = [table.hit(int(row), float(score)) for row, score in zip(rows[0], scores[0], strict=True)]
        return {"among": table.modality, "hits": hits}

    def classify(self, sources: Sources, labels: Sequence[str], templates: str, top_k: int) -> dict[str, Any]:
        """Classify one source by the names of classes.

        Raises:
            RequestError: as `embed`, a class is there twice, or there is more than one source.
        """
        embedder = self.needed_embedder()
        (modality, given), *others = sources.items()
        if others or len(given) > 1:
            raise RequestError("One source is classified at a time: send one text or one file.")
        with refusing():
            embedder.check([modality])
            classifier = self.classifier(tuple(labels), templates)
            options = {"options": self.options_of(sources)} if self.options_of(sources) else {}
            (found,) = classifier.predict(list(given), modality, top_k=top_k, **options)
        return {"classes": [{"label": label, "probability": probability} for label, probability in found]}

    def new_classifier(self, labels: tuple[str, ...], templates: str) -> ZeroShotClassifier:
        """Compute the weights of classes."""
        return ZeroShotClassifier(self.needed_embedder(), labels, templates)

    def row_file(self, modality: str, row: int) -> Path:
        """Return the file of a row.

        Raises:
            RequestError: there is no such row, or it has no file.
        """
        table = self.tables.get(modality)
        if table is None or (path := table.file(row)) is None:
            raise RequestError(f"Row {row} of {modality} has no file, or there is no such row.", 404)
        return path

    def media(self, modality: str, row: int) -> tuple[Path, str]:
        """Return the file of a row, and its type.

        Raises:
            RequestError: there is none that a browser shows or plays.
        """
        path = self.row_file(modality, row)
        kind = KINDS.get(path.suffix.lower())
        if kind not in PLAYED:
            raise RequestError(f"Row {row} of {modality} has no image, audio or video.", 404)
        guessed, _ = mimetypes.guess_type(path.name)
        named = guessed is not None and guessed.startswith(f"{kind}/")
        return path, str(guessed) if named else f"{kind}/{path.suffix.lower()[1:]}"
