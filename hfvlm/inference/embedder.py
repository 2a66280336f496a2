"""Pictures, texts, sounds and whatever else a model embeds, to vectors of unit length."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvlm.checks.ranges import check_integer, shown
from hfvlm.configuration import MultiEncoderConfig
from hfvlm.inference.adapters import config_of, load_model, processor_of
from hfvlm.inference.vectors import combine, similarity, unit_rows
from hfvlm.logs import tracked
from hfvlm.media.errors import MediaError
from hfvlm.media.rows import UNREADABLE, are_several
from hfvlm.modeling.base import unit
from hfvlm.modeling.outputs import MODALITIES

__all__ = ["Embedder", "Embeddings", "combine", "similarity", "unit_rows"]

OUTPUTS = ("numpy", "torch", "arrow")
NO_DIRECTION = "the model gives it a vector that is zero or not finite; is there NaN in the weights or the input?"
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
            folder: a local folder or a Hub id, of a model or of an adapter.
            modalities: as ["image", "audio"]: only these towers are read from disk, where the model has more than two.
            device: "auto" is a GPU where there is one.
            dtype: "auto" is the files' own.
            **options: of the model's `from_pretrained`.

        Raises:
            ValueError: the model has no such modality, or there is no such device or precision.
        """
        device, dtype = chosen_device(device), chosen_dtype(dtype)
        if isinstance(config_of(folder), MultiEncoderConfig) and modalities is not None:
            options["modalities"] = list(modalities)
        model = load_model(folder, dtype=dtype, **options)
        embedder = cls(model.to(device), processor_of(folder))
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
            ValueError: there is nothing to embed, the model does not know the modality, or its vector of a source is
                zero or not finite.
        """
        check_integer("batch_size", batch_size)
        if output not in OUTPUTS:
            raise ValueError(f"output {output!r} is none of {', '.join(OUTPUTS)}.")
        given = {name: value for name, value in sources.items() if value is not None}
        if unknown := sorted(set(given) - set(MODALITIES)):
            raise TypeError(f"encode() has no argument {', '.join(unknown)}; modalities are {', '.join(MODALITIES)}.")
        if not given:
            raise ValueError(f"Nothing to embed: give one of {', '.join(self.modalities)}.")
        self.check(list(given))
        if foreign := sorted(set(options or {}) - set(given)):
            raise ValueError(f"options are given for {', '.join(foreign)}, of which there are no sources.")
        found = {}
        for modality, values in given.items():
            alone = not are_several(values)
            parts = self.batches(
                modality, [values] if alone else values, batch_size, (options or {}).get(modality, {})
            )
            count = 1 if alone else len(values)
            done = list(tracked(parts, modality, -(-count // batch_size)) if progress else parts)
            vectors = self.assembled(done, count)
            found[modality] = as_output(vectors[0] if alone else vectors, output)
        if len(found) == 1:
            return next(iter(found.values()))
        several = Embeddings(found)
        several.embedder = self
        return several

    def assembled(self, parts: list[tuple[list[int], Tensor]], count: int) -> Tensor:
        """Batches to one table; shorter texts of a model that embeds each token end in zeros."""
        if sum(len(places) for places, _ in parts) != count:
            raise RuntimeError(f"Of {count} sources not every one has a vector.")
        tokens = [features.shape[1] for _, features in parts if features.ndim == 3]
        vectors = torch.zeros(count, max(tokens), self.size) if tokens else torch.zeros(count, self.size)
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
        left, right = (torch.as_tensor(x).float() for x in (a, b))
        if {left.ndim, right.ndim} not in ({3}, {2, 3}) or left.shape[-1] != right.shape[-1]:
            raise ValueError(
                f"Vectors must be (N, tokens, D), of one side at least, but got {tuple(left.shape)} and "
                f"{tuple(right.shape)}."
            )
        scores = self.model.score(left, right)
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
            check_texts(sources)
            order.sort(key=lambda i: len(sources[i]))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        given = ([sources[i] for i in batch] for batch in batches)
        prepared = ahead(lambda batch: self.prepare(modality, batch, **options), given)
        for batch, inputs in zip(batches, prepared, strict=True):
            features = self.features(modality, inputs)
            if wrong := unusable(features):
                raise ValueError(f"{modality} {batch[wrong[0]]}: {NO_DIRECTION}")
            yield batch, features

    def prepare(self, modality: str, sources: list[Any], **options: Any) -> Any:
        """Sources -> the model's inputs, on the processor, in memory that a GPU can fetch from."""
        if modality == "text":
            check_texts(sources)
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
        each damaged one, or one whose vector is zero or not finite."""
        features, _, errors = self.finite(modality, len(sources), *self.prepare_readable(modality, sources, options))
        return features.numpy(), errors

    def encode_known(
        self, modality: str, sources: Sequence[Any], *, batch_size: int = 32, progress: bool = False, **options: Any
    ) -> tuple[Tensor, list[int], dict[int, str]]:
        """Many sources of which some may be damaged; the next batch is decoded while the model works.

        Returns:
            `(N, D)`, or `(N, tokens, D)`, the vectors of those that can be read; their places; and by place what is
            wrong with the others.

        Raises:
            ValueError: the model does not know the modality, or batch_size is no number of sources.
        """
        self.check([modality])
        step = check_integer("batch_size", batch_size)
        batches = [list(range(start, min(start + step, len(sources)))) for start in range(0, len(sources), step)]
        given = ([sources[i] for i in batch] for batch in batches)
        prepared = ahead(lambda batch: self.prepare_readable(modality, batch, options), given)
        parts: list[tuple[list[int], Tensor]] = []
        kept: list[int] = []
        errors: dict[int, str] = {}
        for batch, found in zip(
            batches, tracked(prepared, modality, len(batches)) if progress else prepared, strict=True
        ):
            features, places, wrong = self.finite(modality, len(batch), *found)
            parts.append((list(range(len(kept), len(kept) + len(places))), features))
            kept += [batch[i] for i in places]
            errors |= {batch[i]: error for i, error in wrong.items()}
        parts = [part for part in parts if part[0]]
        return self.assembled(parts, len(kept)), kept, errors

    def prepare_readable(
        self, modality: str, sources: list[Any], options: dict[str, Any]
    ) -> tuple[Any, dict[int, str]]:
        """The model's inputs of the sources that can be read, None if there are none; and what is wrong with the
        others."""
        if not sources:
            return None, {}
        try:
            return self.prepare(modality, sources, **options), {}
        except UNREADABLE:
            wrong = ((i, self.problem(modality, source, options)) for i, source in enumerate(sources))
            errors = {i: problem for i, problem in wrong if problem}
            rest = [source for i, source in enumerate(sources) if i not in errors]
            return self.prepare(modality, rest, **options) if rest else None, errors

    def finite(
        self, modality: str, count: int, inputs: Any, errors: dict[int, str]
    ) -> tuple[Tensor, list[int], dict[int, str]]:
        """Features of a batch's inputs that are finite, their places among its `count` sources, and all errors."""
        if inputs is None:
            return torch.zeros(0, self.size), [], errors
        readable, features = [i for i in range(count) if i not in errors], self.features(modality, inputs)
        wrong = set(unusable(features))
        errors = errors | {readable[i]: f"{modality}: {NO_DIRECTION}" for i in wrong}
        rows = [i for i in range(len(readable)) if i not in wrong]
        return features[rows], [readable[i] for i in rows], dict(sorted(errors.items()))

    def problem(self, modality: str, source: Any, options: dict[str, Any]) -> str | None:
        """What is wrong with a source, if anything."""
        try:
            self.prepare(modality, [source], **options)
        except UNREADABLE as error:
            return str(error).removeprefix(f"{modality} 0: ")
        return None


def ahead(function: Callable[[list[Any]], Any], batches: Iterable[list[Any]]) -> Iterator[Any]:
    """`map`, in which the next batches are worked on in a thread before they are asked for."""
    with ThreadPoolExecutor(1) as thread:
        waiting: list[Future[Any]] = []
        for batch in batches:
            waiting.append(thread.submit(function, batch))
            if len(waiting) > AHEAD:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def check_texts(texts: Sequence[Any]) -> None:
    """A MediaError that names the first of them that is no text."""
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise MediaError(f"text {i}: a text is needed, not {shown(text)}.")


def unusable(features: Tensor) -> list[int]:
    """`(B, D)` or `(B, N, D)`, of unit length or zero -> the rows that are not finite, or zero."""
    rows = features.flatten(1)
    return torch.nonzero(~(rows.isfinite().all(dim=1) & rows.any(dim=1))).flatten().tolist()


def chosen_device(device: str | torch.device) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    found = torch.accelerator.current_accelerator()
    if device == "auto":
        return found or torch.device("cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is none: use auto, cpu, cuda or cuda:0.") from error
    if wanted.type not in ("cpu", "meta") and (found is None or found.type != wanted.type):
        raise ValueError(f"device {device}: this machine has none that PyTorch sees; use cpu or auto.")
    return wanted


def chosen_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A precision of weights, "auto" or a floating type.

    Raises:
        ValueError: it is another.
    """
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype == "auto" or (isinstance(kind, torch.dtype) and kind.is_floating_point):
        return dtype
    raise ValueError(f"dtype {dtype!r} is no precision of weights: use auto, float32, bfloat16 or float16.")


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
