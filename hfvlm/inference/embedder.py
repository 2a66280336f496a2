"""Pictures, texts, sounds and whatever else a model embeds, to vectors of unit length."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor

from hfvlm.configuration import MultiEncoderConfig
from hfvlm.inference.devices import device_of
from hfvlm.media.errors import MediaError
from hfvlm.media.rows import are_several
from hfvlm.modeling import unit
from hfvlm.outputs import MODALITIES

OUTPUTS = ("numpy", "torch", "arrow")
# What readers raise for damaged sources; errors in code go through.
UNREADABLE = (MediaError, ValueError, OSError)
# Batches that are decoded before the model asks for them.
AHEAD = 2


class Embeddings(dict[str, Any]):
    """Vectors by modality: {"image": (N, D), "text": (M, D)}."""

    embedder: "Embedder"

    def similarity(self, a: str, b: str) -> Any:
        """`(N, M)`, as the model compares two modalities."""
        return self.embedder.similarity(self[a], self[b])


class Embedder:
    """Turns sources of any modality that a model knows into vectors of one space.

    Args:
        model: with `modalities` and `get_<modality>_features`; it is put in inference mode, on its device.
        processor: the model's.
    """

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model.eval(), processor
        self.modalities = tuple(name for name in model.modalities if name in processor.modalities)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        modalities: Sequence[str] | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> "Embedder":
        """Load a model with its processor.

        Args:
            folder: a local folder or a Hub id.
            modalities: as ["image", "audio"]: only these towers are read from disk, where the model has more than two.
            device: "auto" is a GPU where there is one.
            dtype: "auto" is the files' own.
            **options: of `AutoModel.from_pretrained`.

        Raises:
            ValueError: the model has no such modality, or the machine no such device.
        """
        place = device_of(device)
        if isinstance(AutoConfig.from_pretrained(folder), MultiEncoderConfig) and modalities is not None:
            options["modalities"] = list(modalities)
        model = AutoModel.from_pretrained(folder, dtype=dtype, **options)
        embedder = cls(model.to(place), AutoProcessor.from_pretrained(folder))
        embedder.check(modalities or ())
        return embedder

    @property
    def size(self) -> int:
        """How long a vector is."""
        config = getattr(self.model, self.model.towers[self.modalities[0]]).config
        return config.projection_dim or config.hidden_size

    def check(self, modalities: Sequence[str]) -> None:
        """A ValueError, unless all modalities are known."""
        if unknown := [name for name in modalities if name not in self.modalities]:
            raise ValueError(
                f"{type(self.model).__name__} embeds {', '.join(self.modalities)}, not {', '.join(unknown)}."
            )

    def encode(
        self,
        *,
        batch_size: int = 32,
        progress: bool = False,
        output: str = "numpy",
        options: dict[str, dict[str, Any]] | None = None,
        **sources: Any,
    ) -> Any:
        """Vectors of unit length.

        Args:
            batch_size: sources that the model takes at a time.
            progress: show a bar.
            output: "numpy", "torch" or "arrow", float32.
            options: of the processor, by modality: {"audio": {"sampling_rate": 16000}}.
            **sources: `image=`, `video=`, `text=`, `audio=`, `depth=`, `thermal=`, `imu=`: a list of whatever
                `hfvlm.media` reads, or a column of `datasets`, or one source alone; None is left out.

        Returns:
            For a list `(N, D)`, for a source alone `(D,)`; for more than one modality an `Embeddings` of these.

        Raises:
            MediaError: a source cannot be read; the message names it.
            ValueError: there is nothing to embed, or the model does not know the modality.
        """
        if output not in OUTPUTS:
            raise ValueError(f"output {output!r} is none of {', '.join(OUTPUTS)}.")
        given = {name: value for name, value in sources.items() if value is not None}
        if unknown := sorted(set(given) - set(MODALITIES)):
            raise TypeError(f"encode() has no argument {', '.join(unknown)}; modalities are {', '.join(MODALITIES)}.")
        if not given:
            raise ValueError(f"Nothing to embed: give one of {', '.join(self.modalities)}.")
        self.check(list(given))
        found = {}
        for modality, values in given.items():
            alone = not are_several(values)
            parts = self.batches(
                modality, [values] if alone else values, batch_size, (options or {}).get(modality, {})
            )
            count = 1 if alone else len(values)
            done = list(track(parts, modality, -(-count // batch_size)) if progress else parts)
            vectors = self.assembled(done, count)
            found[modality] = as_output(vectors[0] if alone else vectors, output)
        if len(found) == 1:
            return next(iter(found.values()))
        several = Embeddings(found)
        several.embedder = self
        return several

    def assembled(self, parts: list[tuple[list[int], Tensor]], count: int) -> Tensor:
        """Batches to one table; shorter texts of a model that embeds each token end in zeros."""
        tokens = [features.shape[1] for _, features in parts if features.ndim == 3]
        vectors = torch.zeros(count, max(tokens), self.size) if tokens else torch.empty(count, self.size)
        for places, features in parts:
            if tokens:
                vectors[places, : features.shape[1]] = features
            else:
                vectors[places] = features
        return vectors

    @property
    def by_token(self) -> bool:
        """Whether the model gives a vector to each patch and token, and compares these (FILIP)."""
        return hasattr(self.model, "score")

    def similarity(self, a: Any, b: Any) -> Any:
        """`(N, M)`: the cosines of `(N, D)` and `(M, D)`, or what the model has in their place."""
        if not self.by_token:
            return similarity(a, b)
        scores = self.model.score(torch.as_tensor(a), torch.as_tensor(b))
        return scores if isinstance(a, Tensor) else scores.numpy()

    def check_one_vector(self, purpose: str) -> None:
        """A ValueError, if a source has many vectors."""
        if self.by_token:
            raise ValueError(
                f"{purpose} needs one vector for each source; {type(self.model).__name__} gives one to each patch and "
                "token. Compare them with `similarity`."
            )

    def batches(
        self, modality: str, sources: Sequence[Any], batch_size: int, options: dict[str, Any]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Vectors with their sources' places; texts of like length together, so that little of a batch is padding."""
        order = list(range(len(sources)))
        if modality == "text":
            sources = list(sources)
            order.sort(key=lambda i: len(sources[i]))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        prepared = self.prepared(modality, ([sources[i] for i in batch] for batch in batches), options)
        for batch, inputs in zip(batches, prepared, strict=True):
            yield batch, self.features(modality, inputs)

    def prepared(self, modality: str, batches: Iterable[list[Any]], options: dict[str, Any]) -> Iterator[Any]:
        """Batches in the model's form; the next ones are decoded in a thread while the model works."""
        with ThreadPoolExecutor(1) as thread:
            waiting: list[Future[Any]] = []
            for batch in batches:
                waiting.append(thread.submit(self.prepare, modality, batch, **options))
                if len(waiting) > AHEAD:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()

    def prepare(self, modality: str, sources: list[Any], **options: Any) -> Any:
        """Sources -> the model's inputs, on the processor, in memory that a GPU can fetch from."""
        if modality == "text":
            options = {"padding": True, "truncation": True} | options
        inputs = self.processor.prepare(modality, sources, **options)
        return {k: v.pin_memory() if self.model.device.type == "cuda" else v for k, v in inputs.items()}

    @torch.inference_mode()
    def features(self, modality: str, inputs: Any) -> Tensor:
        """A batch's inputs -> `(B, D)`, float32, on the processor."""
        inputs = {name: value.to(self.model.device, non_blocking=True) for name, value in inputs.items()}
        inputs = {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        features = getattr(self.model, f"get_{modality}_features")(**inputs).pooler_output
        return unit(features.float()).cpu()

    def encode_readable(self, modality: str, sources: list[Any], **options: Any) -> tuple[np.ndarray, dict[int, str]]:
        """A batch of which some sources may be damaged: the vectors of the others, in order, and what is wrong with
        each damaged one."""
        errors: dict[int, str] = {}
        try:
            inputs = self.prepare(modality, sources, **options)
        except UNREADABLE:
            errors = {
                i: wrong for i, source in enumerate(sources) if (wrong := self.problem(modality, source, options))
            }
            rest = [source for i, source in enumerate(sources) if i not in errors]
            if not rest:
                return np.empty((0, self.size), np.float32), errors
            inputs = self.prepare(modality, rest, **options)
        return self.features(modality, inputs).numpy(), errors

    def problem(self, modality: str, source: Any, options: dict[str, Any]) -> str | None:
        """What is wrong with a source, if anything."""
        try:
            self.prepare(modality, [source], **options)
        except UNREADABLE as error:
            return str(error)
        return None


def similarity(a: Any, b: Any) -> Any:
    """`(N, D)`, `(M, D)` -> `(N, M)`, the cosines; of single vectors likewise."""
    left, right = unit_rows(a), unit_rows(b)
    return left @ (right.T if right.ndim > 1 else right)


def combine(*vectors: Any, weights: Sequence[float] | None = None) -> Any:
    """Arithmetic in the embedding space: the weighted sum of vectors of unit length, of unit length again.

    Args:
        *vectors: `(D,)` or `(N, D)` each.
        weights: one for each, negative ones to take something away; by default 1.

    Raises:
        ValueError: there are more or fewer weights than vectors, or the sum is zero.
    """
    weights = [1.0] * len(vectors) if weights is None else list(weights)
    if len(weights) != len(vectors) or not vectors:
        raise ValueError(f"combine() got {len(vectors)} vectors and {len(weights)} weights.")
    return unit_rows(sum(weight * unit_rows(vector) for weight, vector in zip(weights, vectors, strict=True)))


def unit_rows(vectors: Any) -> Any:
    """Arrays or tensors scaled to unit length.

    Raises:
        ValueError: a vector is zero or not a number.
    """
    length = (vectors**2).sum(-1) ** 0.5
    if not bool((length > 0).all()):
        raise ValueError("A vector is zero or not a number; it has no direction.")
    return vectors / length[..., None]


def as_output(vectors: Tensor, output: str) -> Any:
    if output == "torch":
        return vectors
    if output == "numpy":
        return vectors.numpy()
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("output=\"arrow\" needs pyarrow: `pip install 'hfvlm[train]'`.") from error
    flat = pyarrow.array(vectors.flatten().numpy())
    return flat if vectors.ndim == 1 else pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
