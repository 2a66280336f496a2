"""Classification by the names of classes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hfvlm.checks.ranges import check_integer
from hfvlm.inference.embedder import Embedder
from hfvlm.inference.pins import content_hash
from hfvlm.inference.templates import template_set
from hfvlm.inference.vectors import unit_rows
from hfvlm.logs import logged_once
from hfvlm.media.rows import are_several
from hfvlm.writing import replaced

BATCH_SIZE = 256


class ZeroShotClassifier:
    """Classifier of images, or whatever else a model embeds, by the names of classes.

    The weights of a class are the mean of the embeddings of its name in several prompt templates
    (https://arxiv.org/abs/2103.00020, section 3.1.4). Of a model that compares tokens they are the tokens of every
    text, and what is averaged over templates are probabilities without a temperature, as Wukong's authors evaluate
    (huawei-noah/Pretrained-Language-Model at 0598f02, Noah_WuKong/main.py).

    Args:
        embedder: of a model that embeds texts.
        labels: the classes' names; or {class: [name, another name]}.
        templates: "single", "imagenet-7", "imagenet" (80), "imagenet-zh" (80, in Chinese), "name", or one's own, with
            one `{}` each.
        cache: a folder in which weights are cached, by the content of all that they depend on.
    """

    def __init__(
        self,
        embedder: Embedder,
        labels: Sequence[str] | Mapping[str, Sequence[str]],
        templates: str | Sequence[str] = "single",
        *,
        cache: str | Path | None = None,
    ):
        embedder.check(["text"])
        names = dict(labels) if isinstance(labels, Mapping) else {label: [label] for label in labels}
        if not names or len(names) != len(labels):
            raise ValueError("A classifier needs classes, each once.")
        if empty := [label for label, given in names.items() if not given]:
            raise ValueError(f"Class {empty[0]!r} has no names: give at least one.")
        self.embedder, self.labels = embedder, list(names)
        self.templates = template_set(templates if isinstance(templates, str) else list(templates))
        self.sizes = [len(given) for given in names.values()]
        self.weights = self.cached({label: list(given) for label, given in names.items()}, cache)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        labels: Sequence[str] | Mapping[str, Sequence[str]],
        templates: str | Sequence[str] = "single",
        *,
        cache: str | Path | None = None,
        **options: Any,
    ) -> "ZeroShotClassifier":
        """Load a model's folder; `options` are of `Embedder.from_pretrained`."""
        return cls(Embedder.from_pretrained(folder, **options), labels, templates, cache=cache)

    def cached(self, names: Mapping[str, list[str]], cache: str | Path | None) -> np.ndarray:
        """Return the weights of classes, from the cache where they are in it."""
        if cache is None:
            return self.class_weights(names)
        path = Path(cache) / f"{self.content_hash(names)}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced(path) as file, file.open("wb") as opened:
                np.save(opened, self.class_weights(names))
        return np.load(path)

    def class_weights(self, names: Mapping[str, list[str]]) -> np.ndarray:
        """Compute the weights of classes, `(classes, D)`, of unit length; or the tokens of all of their texts,
        `(texts, M, D)`, one template of a name after the other."""
        given = [name for own in names.values() for name in own]
        with logged_once("hfvlm.processing.tokenization"):  # that texts are cut
            if self.embedder.by_token:
                texts = [template.replace("{}", name) for name in given for template in self.templates]
                return self.embedder.encode(text=texts, batch_size=BATCH_SIZE)
            # Texts of one template begin alike: in one batch, towers compute that once.
            step, total = max(1, BATCH_SIZE // len(given)), 0.0
            for start in range(0, len(self.templates), step):
                templates = self.templates[start : start + step]
                texts = [template.replace("{}", name) for template in templates for name in given]
                vectors = self.embedder.encode(text=texts, batch_size=BATCH_SIZE)
                total = total + vectors.reshape(len(templates), len(given), -1).sum(axis=0)
        starts = np.cumsum([0, *self.sizes])[:-1]
        return unit_rows(np.add.reduceat(total, starts))

    def content_hash(self, names: Mapping[str, list[str]]) -> str:
        """Hash the names, the templates and the text tower's weights, which the classes' weights depend on."""
        digest = hashlib.sha256(json.dumps([dict(names), self.templates]).encode())
        model = self.embedder.model
        digest.update(content_hash(getattr(model, model.towers["text"])).encode())
        return digest.hexdigest()

    def scores(self, sources: Sequence[Any], modality: str = "image", **options: Any) -> np.ndarray:
        """Return what sources' classes are ranked by, `(N, classes)`: see `compare`."""
        given: dict[str, Any] = {modality: sources}
        return self.compare(self.embedder.encode(**given, **options))

    def compare(self, vectors: np.ndarray) -> np.ndarray:
        """Compare the embeddings of sources with the classes.

        Args:
            vectors: `(N, D)`, or tokens `(N, M, D)`, of unit length.

        Returns:
            `(N, classes)`, cosines; or, of tokens, logarithms of the probabilities averaged over templates.
        """
        if not self.embedder.by_token:
            return vectors @ self.weights.T
        scores = self.embedder.similarity(vectors, self.weights)
        ends = np.cumsum(self.sizes)[:-1] * len(self.templates)
        by_name = (part.reshape(len(vectors), -1, len(self.templates)) for part in np.split(scores, ends, axis=1))
        by_class = np.exp(np.stack([part.mean(axis=1) for part in by_name], axis=1))
        return np.log((by_class / by_class.sum(axis=1, keepdims=True)).mean(axis=2))

    def predict(self, sources: Any, modality: str = "image", *, top_k: int = 1, **options: Any) -> list[Any]:
        """Predict the best classes of each source with their probabilities, by the model's temperature.

        Args:
            sources: one or a list.
            modality: of the sources.
            top_k: number of classes.
            **options: of `Embedder.encode`.

        Returns:
            `[(class, probability), ...]`, of a list a list of such.

        Raises:
            ValueError: top_k is no number of classes.
        """
        check_integer("top_k", top_k)
        several = are_several(sources)
        cosines = self.scores(sources if several else [sources], modality, **options)
        logits = self.temperature * cosines
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        order = np.argsort(-shares, axis=1, kind="stable")[:, :top_k]
        found = [[(self.labels[j], float(row[j])) for j in best] for row, best in zip(shares, order, strict=True)]
        return found if several else found[0]

    @property
    def temperature(self) -> float:
        """Factor of the cosines; 100, CLIP's, where the model has none for pairs of modalities."""
        scale = getattr(self.embedder.model, "logit_scale", None)
        return 100.0 if scale is None else float(scale.exp().detach())
