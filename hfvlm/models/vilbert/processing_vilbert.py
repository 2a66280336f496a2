"""ViLBERT's inputs: a text and the regions of an image (https://github.com/facebookresearch/vilbert-multi-task at
f22b84a, vilbert/datasets)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from transformers.image_processing_base import BatchFeature

from hfvlm.models.vilbert.regions import Regions
from hfvlm.models.vilbert.tasks import DETECTED, Task, task_of
from hfvlm.processing.base import HfvlmProcessor, call_keywords
from hfvlm.processing.settings import Flag, whole
from hfvlm.processing.tokenization import WordPieceTokenizer

# Features, `(n, F)`, and locations, `(n, 5)`, of regions, the mean first.
Rows = tuple[np.ndarray, np.ndarray]


class HfvlmViLBERTTokenizer(WordPieceTokenizer):
    """BERT's word pieces in lower case, padded on the right.

    `from_vocabulary` reads bert-base-uncased's `vocab.txt`, or a tokenizer.json of the same pieces.
    """

    padding_sides = ("right",)
    DEFAULTS = {**WordPieceTokenizer.DEFAULTS, "model_max_length": 512}

    def pieces(self, text: str) -> list[int]:
        """Encode a text without [CLS] and [SEP], whole."""
        return self(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"]


def padded_regions(rows: Sequence[Rows], length: int) -> dict[str, torch.Tensor]:
    """Cut and pad images' regions to `length` -> `region_features`, `region_locations` and `region_mask`, `(B, length,
    ...)`."""
    features = np.zeros((len(rows), length, rows[0][0].shape[1]), dtype=np.float32)
    locations, mask = np.zeros((len(rows), length, 5), dtype=np.float32), np.zeros((len(rows), length), dtype=np.int64)
    for i, (numbers, places) in enumerate(rows):
        kept = min(len(numbers), length)
        features[i, :kept], locations[i, :kept], mask[i, :kept] = numbers[:kept], places[:kept], 1
    arrays = {"region_features": features, "region_locations": locations, "region_mask": mask}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def padded_texts(texts: Sequence[tuple[list[int], list[int]]], length: int, pad: int = 0) -> dict[str, torch.Tensor]:
    """Pad texts, ids and types of their tokens, to `length` -> `input_ids`, `attention_mask` and `token_type_ids`,
    `(B, length)`."""
    rows = [(ids, [1] * len(ids), types) for ids, types in texts]
    names, fills = ("input_ids", "attention_mask", "token_type_ids"), (pad, 0, 0)
    return {
        name: torch.tensor([row[i] + [fill] * (length - len(row[i])) for row in rows])
        for i, (name, fill) in enumerate(zip(names, fills, strict=True))
    }


class HfvlmViLBERTProcessor(HfvlmProcessor):
    """Texts and regions to ViLBERT's inputs: `processor(text=..., regions=...)`, then `model(**inputs)`.

    Args:
        tokenizer: of the texts.
        feature_size: numbers that the detector gives of a region.
        max_regions: of an image, their mean included, where no task says it.
        task_tokens: whether the model has them, and a task adds `task_ids`.
    """

    parts = {"text": "tokenizer", "regions": "tokenizer"}
    feature_size: Annotated[int, whole()]
    max_regions: Annotated[int, whole(2)]
    task_tokens: Flag

    def __init__(
        self,
        tokenizer: Any = None,
        feature_size: int = 2048,
        max_regions: int = DETECTED,
        *,
        task_tokens: bool = True,
        **kwargs: Any,
    ):
        self.set_arguments(feature_size=feature_size, max_regions=max_regions, task_tokens=task_tokens)
        super().__init__(tokenizer, **kwargs)

    def prepare(self, modality: str, sources: Any, return_tensors: str | None = "pt", **options: Any) -> BatchFeature:
        """Prepare texts, as of VQA, or regions; see `HfvlmProcessor.prepare`."""
        if modality == "text":
            return self(text=sources, task="vqa", return_tensors=return_tensors, **options)
        if modality != "regions":
            raise ValueError(f"{type(self).__name__} prepares {', '.join(self.modalities)}, not {modality}.")
        return self(regions=sources, return_tensors=return_tensors, **options)

    def samples(self, modality: str) -> list[Any] | None:
        """Return two images' regions of noise; of other inputs, none that are special."""
        if modality != "regions":
            return None
        noise, boxes = np.random.RandomState(0), np.array([[10.0, 10.0, 50.0, 40.0], [30.0, 0.0, 90.0, 80.0]])
        return [Regions(noise.randn(2, self.feature_size), boxes, 100, 80) for _ in range(2)]

    def __call__(
        self,
        text: Any = None,
        regions: Regions | Sequence[Regions] | None = None,
        task: str | int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare texts, regions of images, or text i with the regions of image i -> the model's inputs.

        Args:
            text: one or a list.
            regions: those of one image, or a list; see `hfvlm.models.vilbert.regions`.
            task: name or number of a task: texts and regions are cut and padded as it was trained, and `task_ids` are
                added. Without one they are padded to the longest.
            **kwargs: of the tokenizer, or `text_kwargs`; `return_tensors`, "pt", "np", or None for lists.

        Raises:
            TypeError: an unknown keyword, or regions that are no `Regions`.
            ValueError: nothing is given, or as many texts as images are not.
        """
        if text is None and regions is None:
            raise ValueError(f"{type(self).__name__} needs text, regions or both.")
        return_tensors = kwargs.pop("return_tensors", "pt")
        options = self.options_of(kwargs, {"text": call_keywords(self.tokenizer)}, flat=("text",))["text"]
        chosen, data, rows = None if task is None else task_of(task), dict[str, Any](), 0
        if text is not None:
            length = {} if chosen is None else {"padding": "max_length", "max_length": chosen.text_length}
            data |= self.tokenizer(text, **{"return_tensors": "pt", "truncation": True} | length | options)
            rows = len(data["input_ids"])
            if data["input_ids"].ndim == 1:
                data, rows = {name: value.unsqueeze(0) for name, value in data.items()}, 1
        if regions is not None:
            images = [regions] if isinstance(regions, Regions) else list(regions)
            if text is not None and len(images) != rows:
                raise ValueError(f"{rows} texts and regions of {len(images)} images do not go together, one by one.")
            found = [self.region_rows(each) for each in images]
            longest = min(max(len(numbers) for numbers, _ in found), self.max_regions)
            data |= padded_regions(found, longest if chosen is None else chosen.regions)
            rows = len(images)
        if chosen is not None and self.task_tokens:
            data["task_ids"] = torch.full((rows,), chosen.id)
        if return_tensors == "pt":
            return BatchFeature(data)
        return BatchFeature({name: value.tolist() for name, value in data.items()}, tensor_type=return_tensors)

    def region_rows(self, regions: Regions) -> Rows:
        """Return an image's features and locations, their mean first.

        Raises:
            TypeError: these are no `Regions`.
            ValueError: the features are those of another detector.
        """
        if not isinstance(regions, Regions):
            raise TypeError(f"regions are of hfvlm.models.vilbert.regions.Regions, not {type(regions).__name__}.")
        if regions.features.shape[1] != self.feature_size:
            raise ValueError(
                f"regions have features of {regions.features.shape[1]} numbers, the model takes {self.feature_size}: "
                "they are another detector's."
            )
        features, locations, _ = regions.with_mean()
        return features, locations

    def sentence(self, text: str, task: Task) -> tuple[list[int], list[int]]:
        """Encode a text for a task, cut to its length -> ids and types of its tokens."""
        ids = self.tokenizer.pieces(text)[: task.text_length - 2]
        return self.joined(ids)

    def joined(self, *parts: list[int], types: Sequence[int] = (0, 1, 0)) -> tuple[list[int], list[int]]:
        """Put [CLS] before texts and [SEP] after each -> ids and types of their tokens."""
        ids, kinds = [self.tokenizer.cls_token_id], [types[0]]
        for part, kind in zip(parts, types, strict=False):
            ids += [*part, self.tokenizer.sep_token_id]
            kinds += [kind] * (len(part) + 1)
        return ids, kinds

    def inputs(self, task: Task, texts: Sequence[tuple[list[int], list[int]]], rows: Sequence[Rows]) -> dict[str, Any]:
        """Pad texts and regions, text i with those of image i, as a task was trained -> the model's inputs."""
        ids = {"task_ids": torch.full((len(texts),), task.id)} if self.task_tokens else {}
        words = padded_texts(texts, task.text_length, self.tokenizer.pad_token_id)
        return {**words, **padded_regions(rows, task.regions), **ids}

    @staticmethod
    def collate(examples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples of one task, each of which may have several rows."""
        return {name: torch.cat([example[name] for example in examples]) for name in examples[0]}
