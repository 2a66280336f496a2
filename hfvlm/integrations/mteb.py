"""mteb (https://github.com/embeddings-benchmark/mteb): `mteb.evaluate(Encoder("imagebind"), tasks)`. Rows of several
modalities are embedded as the sum of their vectors."""

from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder

from hfvlm.inference.embedder import Embedder

MODALITIES = ("text", "image", "audio", "video")


class Encoder(AbsEncoder):
    """An `Embedder`, or its folder, as a model of mteb's; `options` are of `Embedder.from_pretrained`.

    Raises:
        ValueError: the model has several vectors for a source.
    """

    def __init__(self, model: Any, revision: str | None = None, **options: Any):
        self.embedder = model if isinstance(model, Embedder) else Embedder.from_pretrained(model, **options)
        self.embedder.check_one_vector("mteb")
        about: dict[str, Any] = {"name": f"hfvlm/{type(self.embedder.model).__name__}", "revision": revision}
        about["modalities"] = [name for name in MODALITIES if name in self.embedder.modalities]
        self.mteb_model_meta = ModelMeta.create_empty(about)

    def encode(
        self, inputs: Any, *, task_metadata: Any = None, hf_split: Any = None, hf_subset: Any = None,
        prompt_type: Any = None, batch_size: int = 32, show_progress_bar: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """Embed batches of columns, `{"image": [...], "text": [...]}` -> `(N, D)`, alike in every task."""
        return np.concatenate([self.embed(batch, batch_size) for batch in inputs])

    def embed(self, batch: dict[str, Any], batch_size: int) -> np.ndarray:
        """Embed one batch."""
        columns: list[Any] = [{name: list(batch[name])} for name in MODALITIES if name in batch]
        return np.sum([self.embedder.encode(**column, batch_size=batch_size) for column in columns], axis=0)
