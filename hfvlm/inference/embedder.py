"""Images, texts, audio clips and whatever else a model embeds, to vectors of unit length."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvlm.checks.ranges import check_integer, shown
from hfvlm.configuration import MultiEncoderConfig
from hfvlm.inference.adapters import config_of, load_model, processor_of
from hfvlm.inference.engines import load_engine
from hfvlm.inference.optimization import Optimization
from hfvlm.inference.optimization import optimize as optimized
from hfvlm.inference.placement import check_dtype, find_device, placed
from hfvlm.inference.vectors import combine, similarity, unit_rows
from hfvlm.logs import tracked
from hfvlm.media.errors import MediaError
from hfvlm.media.rows import UNREADABLE, are_several
from hfvlm.media.sources import import_extra
from hfvlm.modeling.base import unit
from hfvlm.modeling.outputs import MODALITIES

__all__ = ["Embedder", "Embeddings", "combine", "similarity", "unit_rows"]

OUTPUTS = ("numpy", "torch", "arrow")
NO_DIRECTION = "the model gives it a vector that is zero or not finite; is there NaN in the weights or the input?"
# Batches that are decoded before the model takes them.
AHEAD = 2


class Embeddings(dict[str, Any]):
    """Vectors by modality: {"image": (N, D), "text": (M, D)}."""

    embedder: "Embedder"

    def similarity(self, a: str, b: str) -> Any:
        """Compare two modalities as the model does; `(N, M)`."""
        return self.embedder.similarity(self[a], self[b])


class Embedder:
    """Sources of any modality that a model knows, as vectors of one space.

    Args:
        model: with `modalities` and `get_<modality>_features`; it is put in inference mode, on its device.
        processor: the model's.

    Raises:
        ValueError: the model embeds nothing.
    """

    def __init__(self, model: Any, processor: Any):
        if not hasattr(model, "modalities"):
            raise ValueError(f"{type(model).__name__} embeds nothing; CLIP, SigLIP, ImageBind and others of hfvlm do.")
        self.model, self.processor = model.eval(), processor
        self.modalities = tuple(name for name in model.modalities if name in processor.modalities)
        self.optimization: Optimization | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        modalities: Sequence[str] | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        optimize: bool = False,
        engine: str = "torch",
        **options: Any,
    ) -> "Embedder":
        """Load a model with its processor.

        Args:
            folder: a local folder or a Hub id, of a model or of an adapter.
            modalities: as ["image", "audio"]: only these towers are read from disk, where the model has more than two.
            device: "auto" is a GPU where there is one.
            dtype: "auto" is the files' own.
            optimize: pack weights where that is faster, by `hfvlm.optimize`; what was chosen is `optimization`.
            engine: "onnxruntime" or "openvino", for a folder of `hfvlm export --to onnx`.
            **options: of the model's `from_pretrained`.

        Raises:
            ValueError: the model has no such modality, or there is no such device, precision or engine.
        """
        if engine != "torch":
            options |= {"device": device, "dtype": dtype, "optimize": optimize}
            embedder = cls(load_engine(engine, folder, modalities, **options), processor_of(folder))
            embedder.check(modalities or ())
            return embedder
        device, dtype = find_device(device), check_dtype(dtype)
        if isinstance(config_of(folder), MultiEncoderConfig) and modalities is not None:
            options["modalities"] = list(modalities)
        model = load_model(folder, dtype=dtype, **options)
        embedder = cls(model.to(device), processor_of(folder))
        embedder.check(modalities or ())
        if optimize:
            embedder.optimization = optimized(embedder.model)
        return embedder

    @property
    def size(self) -> int:
        """Length of a vector."""
        config = getattr(self.model, self.model.towers[self.modalities[0]]).config
        return getattr(config, "projection_dim", None) or config.hidden_size

    def check(self, modalities: Sequence[str]) -> None:
        """Refuse modalities that the model does not embed.

        Raises:
            ValueError: it does not embed one.
        """
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
        """Embed sources, as vectors of unit length.

        Args:
            batch_size: sources that the model takes at a time.
            progress: show a bar.
            output: "numpy", "torch" or "arrow", float32.
            options: of the processor, by modality: {"audio": {"sampling_rate": 16000}}.
            **sources: `image=`, `video=`, `text=`, `audio=`, `depth=`, `thermal=`, `imu=`: a list of whatever
                `hfvlm.media` reads, or a column of `datasets`, or a single source; None is left out.

        Returns:
            For a list `(N, D)`, for a single source `(D,)`; for more than one modality an `Embeddings` of these.

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
            several = are_several(values)
            items = values if several else [values]
            parts = self.batches(modality, items, batch_size, (options or {}).get(modality, {}))
            count = len(items)
            done = list(tracked(parts, modality, -(-count // batch_size)) if progress else parts)
            vectors = self.assembled(done, count)
            found[modality] = as_output(vectors if several else vectors[0], output)
        if len(found) == 1:
            return next(iter(found.values()))
        embeddings = Embeddings(found)
        embeddings.embedder = self
        return embeddings

    def assembled(self, parts: list[tuple[list[int], Tensor]], count: int) -> Tensor:
        """Assemble batches to one table; shorter texts of a model that embeds each token end in zeros."""
        if sum(len(positions) for positions, _ in parts) != count:
            raise RuntimeError(f"Of {count} sources not every one has a vector.")
        tokens = [features.shape[1] for _, features in parts if features.ndim == 3]
        vectors = torch.zeros(count, max(tokens), self.size) if tokens else torch.zeros(count, self.size)
        for positions, features in parts:
            if tokens:
                vectors[positions, : features.shape[1]] = features
            else:
                vectors[positions] = features
        return vectors

    @property
    def by_token(self) -> bool:
        """True of a model with a vector for each patch and token, which compares these (FILIP)."""
        return hasattr(self.model, "score")

    def similarity(self, a: Any, b: Any) -> Any:
        """Return `(N, M)`: the cosines of `(N, D)` and `(M, D)`, or the model's own scores.

        Raises:
            ValueError: the vectors have other shapes.
        """
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
        """Refuse a model with many vectors for each source.

        Raises:
            ValueError: it is one; the message names the purpose.
        """
        if self.by_token:
            raise ValueError(
                f"{purpose} needs one vector for each source; {type(self.model).__name__} gives one to each patch and "
                "token. Compare them with `similarity`."
            )

    def batches(
        self, modality: str, sources: Sequence[Any], batch_size: int, options: dict[str, Any]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield vectors with their sources' positions; texts of like length together, so that little is padding."""
        order = list(range(len(sources)))
        if modality == "text":
            sources = list(sources)
            check_texts(sources)
            order.sort(key=lambda i: len(sources[i]))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for batch, inputs in ahead(partial(self.prepare, modality, **options), sources, batches):
            features = self.features(modality, inputs)
            if wrong := unusable(features):
                raise ValueError(f"{modality} {batch[wrong[0]]}: {NO_DIRECTION}")
            yield batch, features

    def prepare(self, modality: str, sources: list[Any], **options: Any) -> Any:
        """Prepare the model's inputs, on the CPU, in memory that a GPU can fetch from.

        Raises:
            MediaError: a source cannot be read.
        """
        if modality == "text":
            check_texts(sources)
            options = {"padding": True, "truncation": True} | options
        inputs = self.processor.prepare(modality, sources, **options)
        return {k: v.pin_memory() if self.model.device.type == "cuda" else v for k, v in inputs.items()}

    @torch.inference_mode()
    def features(self, modality: str, inputs: Any) -> Tensor:
        """Embed a batch's inputs: `(B, D)`, float32, on the CPU."""
        features = self.model.embeddings(modality, **placed(inputs, self.model))
        return unit(features.float()).cpu()

    def encode_readable(self, modality: str, sources: list[Any], **options: Any) -> tuple[np.ndarray, dict[int, str]]:
        """Embed a batch of which some sources may be damaged.

        Returns:
            The vectors of the others, in order; by position, what is wrong with each damaged one, or one whose vector
            is zero or not finite.
        """
        vectors, _, errors = self.encode_known(modality, sources, batch_size=max(1, len(sources)), **options)
        return vectors.numpy(), errors

    def encode_known(
        self, modality: str, sources: Sequence[Any], *, batch_size: int = 32, progress: bool = False, **options: Any
    ) -> tuple[Tensor, list[int], dict[int, str]]:
        """Embed many sources of which some may be damaged; the next batch is decoded while the model works.

        Returns:
            `(N, D)`, or `(N, tokens, D)`, the vectors of those that can be read; their positions; and by position what
            is wrong with the others.

        Raises:
            ValueError: the model does not know the modality, or batch_size is no number of sources.
        """
        self.check([modality])
        step = check_integer("batch_size", batch_size)
        batches = [list(range(start, min(start + step, len(sources)))) for start in range(0, len(sources), step)]
        prepared = ahead(partial(self.prepare_readable, modality, options), sources, batches)
        parts: list[tuple[list[int], Tensor]] = []
        readable: list[int] = []
        errors: dict[int, str] = {}
        for batch, found in tracked(prepared, modality, len(batches)) if progress else prepared:
            features, positions, wrong = self.finite(modality, len(batch), *found)
            parts.append((list(range(len(readable), len(readable) + len(positions))), features))
            readable += [batch[i] for i in positions]
            errors |= {batch[i]: error for i, error in wrong.items()}
        return self.assembled([part for part in parts if part[0]], len(readable)), readable, errors

    def prepare_readable(
        self, modality: str, options: dict[str, Any], sources: list[Any]
    ) -> tuple[Any, dict[int, str]]:
        """Prepare the sources that can be read.

        Returns:
            The model's inputs, None if there are none; by position, what is wrong with the other sources.
        """
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
        """Return a batch's finite features, their positions among its `count` sources, and all errors."""
        if inputs is None:
            return torch.zeros(0, self.size), [], errors
        readable, features = [i for i in range(count) if i not in errors], self.features(modality, inputs)
        wrong = set(unusable(features))
        errors = errors | {readable[i]: f"{modality}: {NO_DIRECTION}" for i in wrong}
        rows = [i for i in range(len(readable)) if i not in wrong]
        return features[rows], [readable[i] for i in rows], dict(sorted(errors.items()))

    def problem(self, modality: str, source: Any, options: dict[str, Any]) -> str | None:
        """Describe what is wrong with a source, if anything."""
        try:
            self.prepare(modality, [source], **options)
        except UNREADABLE as error:
            return str(error).removeprefix(f"{modality} 0: ")
        return None


def ahead(
    function: Callable[[list[Any]], Any], sources: Sequence[Any], batches: Sequence[list[int]]
) -> Iterator[tuple[list[int], Any]]:
    """Yield each batch of positions with the function of its sources, which a thread computes before it is needed."""
    with ThreadPoolExecutor(1) as thread:
        waiting: list[tuple[list[int], Future[Any]]] = []
        for batch in batches:
            waiting.append((batch, thread.submit(function, [sources[i] for i in batch])))
            if len(waiting) > AHEAD:
                first, future = waiting.pop(0)
                yield first, future.result()
        for batch, future in waiting:
            yield batch, future.result()


def check_texts(texts: Sequence[Any]) -> None:
    """Refuse what is no text.

    Raises:
        MediaError: one is none; the message names the first.
    """
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise MediaError(f"text {i}: a text is needed, not {shown(text)}.")


def unusable(features: Tensor) -> list[int]:
    """Find the rows of `(B, D)` or `(B, N, D)` that are not finite, or zero."""
    rows = features.flatten(1)
    return torch.nonzero(~(rows.isfinite().all(dim=1) & rows.any(dim=1))).flatten().tolist()


def as_output(vectors: Tensor, output: str) -> Any:
    """Convert vectors to one of OUTPUTS.

    Raises:
        ImportError: it is "arrow", and pyarrow is not installed.
    """
    if output == "torch":
        return vectors
    if output == "numpy":
        return vectors.numpy()
    pyarrow = import_extra("pyarrow", "train", 'output="arrow"')
    flat = pyarrow.array(vectors.flatten().numpy())
    return flat if vectors.ndim == 1 else pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
