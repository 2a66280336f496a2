"""An Embedder that several threads use at a time."""

from threading import BoundedSemaphore, Lock
from typing import Any

from torch import Tensor

from hfvlm.inference.embedder import Embedder
from hfvlm.media.sources import THREADS


class SharedEmbedder(Embedder):
    """An Embedder for several threads, each of which gets what it would get alone.

    Batches of several requests would change the last digits of each, so the model takes one after the other; media are
    decoded at the same time, of as many requests as there are threads for it.
    """

    def __init__(self, model: Any, processor: Any):
        super().__init__(model, processor)
        # Padding and truncation are a state of tokenizers.
        self.tokenizing, self.computing, self.decoding = Lock(), Lock(), BoundedSemaphore(THREADS)

    def prepare(self, modality: str, sources: list[Any], **options: Any) -> Any:
        with self.tokenizing if modality == "text" else self.decoding:
            return super().prepare(modality, sources, **options)

    def features(self, modality: str, inputs: Any) -> Tensor:
        with self.computing:
            return super().features(modality, inputs)
