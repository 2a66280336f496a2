"""The regions that a detector found in an image: from arrays, from the authors' lmdb and npy files, and from a
detector of transformers.

Source: https://github.com/facebookresearch/vilbert-multi-task at f22b84a, vilbert/datasets/_image_features_reader.py,
script/extract_features.py and script/convert_to_lmdb.py. The authors' detector, a Faster R-CNN trained on Visual
Genome, is not in transformers: released weights need its features.
"""

import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvlm.media.errors import MediaError
from hfvlm.media.sources import check_finite, import_extra

# Detectors of transformers whose tokens are their features, one for each box.
DETECTORS = "DETR, Conditional DETR, Deformable DETR, DAB-DETR, Table Transformer, RT-DETR, RT-DETRv2, D-FINE"
# What pickled arrays call when they are read, in the NumPy of any year.
_NUMPY = {f"numpy.{core}.multiarray" for core in ("core", "_core")} | {
    f"numpy.{core}.numeric" for core in ("core", "_core")
}
_ALLOWED = {
    *((module, name) for module in _NUMPY for name in ("_reconstruct", "scalar", "_frombuffer")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class Regions:
    """The regions of an image.

    Args:
        features: `(n, feature_size)`, a detector's.
        boxes: `(n, 4)`: left, top, right and bottom edge, in pixels.
        width: of the image, in pixels.
        height: of the image, in pixels.
        probabilities: `(n, classes)`, a detector's, or None.

    Raises:
        MediaError: arrays that do not fit each other, or hold NaN or infinity, or no region.
    """

    features: np.ndarray
    boxes: np.ndarray
    width: int
    height: int
    probabilities: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("features", "boxes", "probabilities"):
            value = getattr(self, name)
            if value is None:
                continue
            value = np.asarray(value.detach().cpu().float() if isinstance(value, Tensor) else value)
            check_finite(value, f"regions' {name}", "Leave such regions out.")
            object.__setattr__(self, name, value.astype(np.float32))
        features, boxes = self.features, self.boxes
        if features.ndim != 2 or boxes.shape != (len(features), 4):
            raise MediaError(
                f"regions: features are (n, feature_size) and boxes (n, 4), not {features.shape} and {boxes.shape}."
            )
        if self.probabilities is not None and self.probabilities.shape[:1] != (len(features),):
            raise MediaError(f"regions: probabilities are {self.probabilities.shape} of {len(features)} regions.")
        if not (self.width > 0 and self.height > 0):
            raise MediaError(f"regions: an image of {self.width} x {self.height} pixels.")
        if (boxes[:, 2:] < boxes[:, :2]).any():
            raise MediaError("regions: a box ends before it begins; boxes are left, top, right, bottom, in pixels.")

    def __len__(self) -> int:
        return len(self.features)

    @property
    def locations(self) -> np.ndarray:
        """The boxes and their areas in shares of the image's, `(n, 5)`."""
        boxes, size = self.boxes, float(self.width) * float(self.height)
        area = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 2] - boxes[:, 0]) / size
        scale = np.array([self.width, self.height, self.width, self.height], dtype=np.float32)
        return np.concatenate([boxes / scale, area[:, None]], axis=1).astype(np.float32)

    def with_mean(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Put the whole image first: features `(n + 1, F)`, of which the first are the mean, locations `(n + 1, 5)`,
        and boxes `(n + 1, 4)` in pixels."""
        mean = self.features.sum(axis=0, keepdims=True) / len(self)
        whole = np.array([[0, 0, self.width, self.height]], dtype=np.float32)
        return (
            np.concatenate([mean, self.features]),
            np.concatenate([np.array([[0, 0, 1, 1, 1]], dtype=np.float32), self.locations]),
            np.concatenate([whole, self.boxes]),
        )


def overlaps(boxes: np.ndarray, box: Any) -> np.ndarray:
    """Compute the intersection over union of boxes `(n, 4)` with one box or several, `(4,)` or `(m, 4)` -> `(n,)` or
    `(n, m)`. A box of pixels holds its last row and column, too."""
    others = np.atleast_2d(np.asarray(box, dtype=np.float32))
    first = boxes.astype(np.float32)[:, None, :]
    low, high = np.maximum(first[..., :2], others[..., :2]), np.minimum(first[..., 2:], others[..., 2:])
    inside = np.clip(high - low + 1, 0, None).prod(axis=-1)
    areas = [(each[..., 2:] - each[..., :2] + 1).prod(axis=-1) for each in (first, others)]
    shares = inside / (areas[0] + areas[1] - inside)
    return shares[:, 0] if np.ndim(box) == 1 else shares


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays, numbers and texts; nothing else is looked up, and so nothing is run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays are read")
        return super().find_class(module, name)


def read_record(data: bytes, name: str = "record") -> Any:
    """Read what the authors pickled for an image.

    Raises:
        MediaError: something else than plain values and arrays, or no pickle.
    """
    try:
        return _ArraysOnly(io.BytesIO(data)).load()
    except Exception as error:  # foreign bytes can make no sense in every way
        raise MediaError(f"{name}: no record of a detector's regions ({error}).") from error


def regions_of_record(record: Any, name: str = "record") -> Regions:
    """Make regions of a record of an lmdb file, or of an npy file, whose names differ.

    Raises:
        MediaError: the record lacks a part; the message names it.
    """
    if not isinstance(record, Mapping):
        raise MediaError(f"{name}: a record is a dictionary, not {type(record).__name__}.")

    def part(*names: str) -> Any:
        found = next((record[each] for each in names if record.get(each) is not None), None)
        if found is None:
            raise MediaError(f"{name}: the record has no {' or '.join(names)}; it has {', '.join(map(str, record))}.")
        return found

    boxes = np.asarray(part("boxes", "bbox")).reshape(-1, 4)
    features = np.asarray(part("features"))
    if features.size % max(len(boxes), 1):
        raise MediaError(f"{name}: {features.size} numbers are no features of {len(boxes)} boxes.")
    return Regions(
        features.reshape(len(boxes), -1),
        boxes,
        int(part("image_w", "image_width")),
        int(part("image_h", "image_height")),
        record.get("cls_prob"),
    )


def read_npy(path: str | Path) -> Regions:
    """Read an npy file of extract_features.py, which holds a dictionary.

    Raises:
        MediaError: it is none.
    """
    data = Path(path).read_bytes()
    file = io.BytesIO(data)
    try:
        major, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError as error:
        raise MediaError(f"{path}: no npy file ({error}).") from error
    if shape != () or dtype != np.dtype(object):
        raise MediaError(
            f"{path}: an array {shape} of {dtype}, not a dictionary of regions; make `Regions` of arrays."
        )
    record = read_record(data[file.tell() :], str(path))
    return regions_of_record(record.item() if isinstance(record, np.ndarray) else record, str(path))


class RegionFile(Mapping[str, Regions]):
    """An lmdb file of the authors': regions by the image's name, each read when it is asked for.

    Args:
        path: the folder.

    Raises:
        ImportError: lmdb is not installed (`pip install 'hfvlm[regions]'`).
        MediaError: the file holds no list of names.
    """

    def __init__(self, path: str | Path):
        lmdb = import_extra("lmdb", "regions", "Reading an lmdb file of regions")
        self.path = str(path)
        if not Path(path).exists():
            raise MediaError(f"{path}: there is no such file.")
        self.file = lmdb.open(self.path, readonly=True, lock=False, readahead=False, meminit=False)
        names = self._get(b"keys")
        if not isinstance(names, list):
            raise MediaError(f"{path}: no list of images is stored under its key 'keys'.")
        self.names = {name.decode() if isinstance(name, bytes) else str(name): None for name in names}

    def _get(self, key: bytes) -> Any:
        with self.file.begin(write=False) as transaction:
            data = transaction.get(key)
        return None if data is None else read_record(data, f"{self.path}, {key.decode()}")

    def __getitem__(self, image: Any) -> Regions:
        record = self._get(str(image).encode()) if str(image) in self.names else None
        if record is None:
            raise KeyError(f"{self.path} has no image {image!r}; it has {len(self)} others.")
        return regions_of_record(record, f"{self.path}, {image}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def detected_regions(
    output: Any, sizes: Any, *, most: int = 100, threshold: float = 0.0, background: bool = True
) -> list[Regions]:
    """Make regions of what a detector of transformers found, the surest first.

    The detectors are those whose output has `last_hidden_state`, `(B, n, F)`, a token for each of its `pred_boxes`,
    `(B, n, 4)`, centres and sizes in shares of the image's, and `logits`, `(B, n, classes)`.

    Args:
        output: of the detector.
        sizes: `(height, width)` of each image, in pixels.
        most: regions of an image.
        threshold: of the probability of a region's class.
        background: the last class is none (DETR, Table Transformer); without it each class has a probability of its
            own (all the others).

    Raises:
        ValueError: the detector is of another kind.
    """
    tokens, boxes, logits = (getattr(output, name, None) for name in ("last_hidden_state", "pred_boxes", "logits"))
    if tokens is None or boxes is None or logits is None or tokens.shape[:2] != boxes.shape[:2]:
        raise ValueError(f"These are no outputs of a detector with a token for each box, as {DETECTORS} have.")
    if len(sizes) != len(boxes):
        raise ValueError(f"sizes has {len(sizes)} images, the detector's output {len(boxes)}.")
    found = []
    for i, (height, width) in enumerate(sizes):
        chances = logits[i].float().softmax(-1) if background else logits[i].float().sigmoid()
        scores = (chances[:, :-1] if background else chances).amax(-1)
        order = scores.argsort(descending=True)[:most]
        order = order[scores[order] >= threshold] if (scores[order] >= threshold).any() else order[:1]
        centre, half = boxes[i][order, :2].float(), boxes[i][order, 2:].float() / 2
        edges = torch.cat([centre - half, centre + half], dim=-1).clamp(0, 1)
        pixels = edges * torch.tensor([width, height, width, height], dtype=torch.float32, device=edges.device)
        arrays = [each.detach().cpu().float().numpy() for each in (tokens[i][order], pixels, chances[order])]
        found.append(Regions(arrays[0], arrays[1], int(width), int(height), arrays[2]))
    return found
