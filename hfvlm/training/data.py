"""Rows of data sets on their way to a model: drawn, read, augmented, put into batches. All but the drawing happens in
the data loader's workers."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from hfvlm.checks.ranges import check_integer
from hfvlm.media import read_video
from hfvlm.media.rows import COLUMNS, UNREADABLE, captions_of, columns_by_name

logger = logging.getLogger(__name__)

MOST_TRIES = 10
# What a collator adds to the model's inputs.
BOOKKEEPING = ("row_ids", "caption_counts", "replaced")
ID_BYTES = 7


class Reader(Protocol):
    """A function that reads one row: its files are decoded and, where there are random numbers, augmented."""

    def __call__(self, row: Mapping[str, Any], random: np.random.Generator | None) -> Mapping[str, Any]: ...


class EpochSampler(Sampler[tuple[int, int]]):
    """All indices in an order that depends only on the seed and the epoch, so that a run can be resumed exactly.

    Yields `(index, epoch)`, as `Rows` takes them.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = check_integer("length", length, 0), check_integer("seed", seed, 0), 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return ((int(index), self.epoch) for index in order)


class Rows(Dataset[Any]):
    """A view of a data set whose rows are read, augmented and, where they cannot be read, replaced by others.

    An index is for evaluation: nothing is random. An `(index, epoch)` is for training: what is random about a row
    depends only on the seed, its index and the epoch. Rows come with their "index" and with "replaced": the number of
    unreadable rows that they replace. Without `read`, rows are as the data set gives them.

    Raises:
        ValueError: ten rows in turn cannot be read.
    """

    def __init__(self, dataset: Any, read: Reader | None, seed: int = 0):
        self.dataset, self.read, self.seed = dataset, read, check_integer("seed", seed, 0)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        index, epoch = key if isinstance(key, tuple) else (key, None)
        if self.read is None:
            return self.dataset[index]
        random = np.random.default_rng((self.seed, index, epoch or 0))
        for replaced in range(MOST_TRIES):
            try:
                row = self.read(self.dataset[index], None if epoch is None else random)
                return {**row, "index": index, "replaced": replaced}
            except UNREADABLE as error:
                logger.warning("Row %d is skipped: %s", index, error)
            index = int(random.integers(len(self)))
        raise ValueError(f"{MOST_TRIES} rows in turn cannot be read, the last is row {index}: is this the right data?")


class StreamedRows(IterableDataset[Any]):
    """A view of a data set that streams, whose rows are read and augmented, and left out where they cannot be read.

    What is random about a row depends only on the seed, its index in the stream and the epoch. Rows come with their
    "index" in the stream and with "replaced": in training, the number of rows before it that were left out. Without
    `read`, rows are as the data set gives them.

    Args:
        dataset: a `datasets.IterableDataset`, or one of PyTorch's.
        read: see `Reader`.
        seed: of all that is random.
        group: rows come in whole groups of this size, and an incomplete last one is left out; None for all rows.
        training: draw what is random.

    Raises:
        ValueError: ten rows in turn cannot be read.
    """

    def __init__(
        self, dataset: Any, read: Reader | None, seed: int = 0, *, group: int | None = None, training: bool = False
    ):
        self.dataset, self.read, self.seed, self.group, self.training = dataset, read, seed, group, training
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Give an epoch its own order, if the data set shuffles, and its own random numbers."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        if self.group is None:
            yield from self.rows()
            return
        held: list[Any] = []
        for row in self.rows():
            held.append(row)
            if len(held) == self.group:
                yield from held
                held = []

    def rows(self) -> Iterator[Any]:
        """Yield the rows of this worker that can be read."""
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        left_out = 0
        for i, row in enumerate(self.dataset):
            index = first + i * step
            if self.read is None:
                yield row
                continue
            random = np.random.default_rng((self.seed, index, self.epoch)) if self.training else None
            try:
                values = self.read(row, random)
            except UNREADABLE as error:
                logger.warning("Row %d is skipped: %s", index, error)
                left_out += 1
                if left_out >= MOST_TRIES:
                    raise ValueError(f"{MOST_TRIES} rows in turn cannot be read, the last is row {index}.") from error
                continue
            yield {**values, "index": index, "replaced": left_out if self.training else 0}
            left_out = 0


def _image(value: Any, processor: Any) -> Any:
    """Read an image as upright as the processor does, so that augmentations see it as the model does."""
    from hfvlm.media.images import read_image

    return read_image(value, upright=getattr(getattr(processor, "image_processor", None), "upright", True))


def read_images(value: Any, processor: Any) -> Any:
    """Read an image, or each of a list."""
    return [_image(each, processor) for each in value] if isinstance(value, list) else _image(value, processor)


READERS: dict[str, Callable[[Any, Any], Any]] = {"image": _image, "text": lambda value, _: captions_of(value)}


class ContrastiveCollator:
    """Collator of rows with several modalities to the inputs of a model.

    Args:
        processor: of the model.
        columns: {"image": "photo", "text": "caption"}: the columns that hold each modality. By default those that are
            called as modalities are: "image", "text", "audio", "video", "depth", "thermal", "imu"; the text may be
            in a column "caption" or "captions", and webdataset's names ("jpg", "txt", ...) are known.
        id_column: rows with the same value there count as positives of one another in evaluations, as several captions
            of one image; numbers or texts. By default each row is its own.
        augment: {"image": RandomResizedCrop(224)}: what is done in training to a value of a modality, given it and a
            `numpy.random.Generator`.
        all_captions: take every caption of a row in evaluations; False takes its first, for losses of pairs.
        **options: of the tokenizer, as `max_length`.

    In a trainer that does not read rows first, as transformers' own, they are read here: without random numbers, with
    their first captions, and with `return_loss` among the inputs.

    A column of texts may hold a list of captions for each row, of which training draws one.
    Values are whatever `hfvlm.media` reads: paths, bytes, arrays, PIL images, `datasets` rows.
    """

    readers: ClassVar[Mapping[str, Callable[[Any, Any], Any]]] = READERS

    def __init__(
        self,
        processor: Any,
        columns: Mapping[str, str] | None = None,
        *,
        id_column: str | None = None,
        augment: Mapping[str, Callable[[Any, np.random.Generator], Any]] | None = None,
        all_captions: bool = True,
        **options: Any,
    ):
        if options.get("max_length") is not None:
            check_integer("max_length", options["max_length"])
        self.processor, self.columns, self.id_column = processor, columns, id_column
        self.augment, self.all_captions, self.options = dict(augment or {}), all_captions, options

    def read(self, row: Mapping[str, Any], random: np.random.Generator | None) -> dict[str, Any]:
        """Read a row of the data set: its values by modality, an image, a list of texts, else the model's inputs."""
        values = {}
        for modality, column in self.columns_of(row).items():
            if column not in row:
                raise KeyError(f"The data set has no column {column!r} for {modality}; it has {', '.join(row)}.")
            read = self.readers.get(modality)
            value = read(row[column], self.processor) if read else self.processor.prepare(modality, [row[column]])
            if modality == "text" and random is not None:
                value = [value[int(random.integers(len(value)))]]
            elif modality == "text" and not self.all_captions:
                value = value[:1]
            if random is not None and modality in self.augment:
                change = self.augment[modality]
                value = [change(each, random) for each in value] if isinstance(value, list) else change(value, random)
            values[modality] = value
        if self.id_column is not None:
            values["id"] = row[self.id_column]
        return values

    def read_plain(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Read rows of the data set as `Rows` would in an evaluation, with their first captions.

        Raises:
            ValueError: they are to be augmented, which only a `RowTrainer` does.
        """
        if self.augment:
            raise ValueError("augment needs a ContrastiveTrainer or RowTrainer, which know training from evaluation.")
        read = [self.read(row, None) for row in rows]
        for i, values in enumerate(read):
            values.update({"index": i, "replaced": 0}, **({"text": values["text"][:1]} if "text" in values else {}))
        return read

    def columns_of(self, row: Mapping[str, Any]) -> Mapping[str, str]:
        """Return the column of each modality."""
        return columns_by_name(row) if self.columns is None else self.columns

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows of `Rows` to the model's inputs and "row_ids", "caption_counts" and "replaced", `(B,)` each,
        which the trainer takes out again; rows of a data set to the model's inputs and "return_loss".

        Raises:
            ValueError: rows of a data set are to be augmented, which only a `RowTrainer` does.
        """
        if "replaced" not in rows[0]:
            inputs = self(self.read_plain(rows))
            return {k: v for k, v in inputs.items() if k not in BOOKKEEPING} | {"return_loss": True}
        values: dict[str, Any] = {}
        if "image" in rows[0]:
            values["images"] = [row["image"] for row in rows]
        if "text" in rows[0]:
            values["text"] = [text for row in rows for text in row["text"]]
            values |= {"padding": True, "truncation": True} | self.options
        inputs = dict(self.processor(**values, return_tensors="pt")) if values else {}
        for modality in [name for name in COLUMNS if name in rows[0] and name not in self.readers]:
            for name in rows[0][modality]:
                inputs[name] = torch.cat([row[modality][name] for row in rows])
        counts = [len(row.get("text", "1")) for row in rows]
        return {
            **inputs,
            "row_ids": torch.tensor([row_id(row.get("id", row["index"])) for row in rows]),
            "caption_counts": torch.tensor(counts),
            "replaced": torch.tensor([row["replaced"] for row in rows]),
        }


class PairCollator(ContrastiveCollator):
    """Collator whose batches name in `pair_ids`, `(B,)`, which rows are about the same image: those with one value in
    `id_column`."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        inputs = super().__call__(rows)
        return inputs | ({"pair_ids": inputs["row_ids"]} if "row_ids" in inputs else {})


class CaptionCollator(ContrastiveCollator):
    """Collator of images with captions to the inputs of a model that learns to generate these, by its processor's
    `captions`; arguments as above, but `**options` are those of `captions`.

    A row may have a list of images, or a video, where the processor takes these.
    """

    readers = READERS | {"image": read_images, "video": lambda value, _: read_video(value)}

    def columns_of(self, row: Mapping[str, Any]) -> Mapping[str, str]:
        """Return the column of each modality that the row has: of images and videos, in mixtures of both, one."""
        columns = super().columns_of(row)
        return {m: column for m, column in columns.items() if m == "text" or row.get(column) is not None} or columns

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows of `Rows` or of a data set, of each the first caption, to the model's inputs, `labels` and, of
        `Rows`, "replaced"."""
        read = rows if "replaced" in rows[0] else self.read_plain(rows)
        visual = [row["video"] if "video" in row else row["image"] for row in read]
        inputs = dict(self.processor.captions(visual, [row["text"][0] for row in read], **self.options))
        return inputs | ({"replaced": torch.tensor([row["replaced"] for row in rows])} if read is rows else {})


def row_id(value: Any) -> int:
    """Convert an identifier of any kind to a number: numbers as they are, texts by their hash."""
    if isinstance(value, int | np.integer):
        return int(value)
    return int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:ID_BYTES], "big")
