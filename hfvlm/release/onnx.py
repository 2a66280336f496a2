"""Towers as ONNX graphs, which run without PyTorch: in ONNX Runtime, OpenVINO, browsers and others."""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor

from hfvlm.inference.engines import ONNX_SETTINGS, OnnxRuntime
from hfvlm.media.sources import import_extra
from hfvlm.modeling.dual_encoder import ContrastiveModel
from hfvlm.presets.cards import record_of, write_export_card
from hfvlm.release.verification import samples
from hfvlm.versions import __version__
from hfvlm.writing import new_folder

TOLERANCE = 1e-4
# A file of protobuf ends at 2 GiB; weights of larger towers are in a file of their own.
LARGEST_FILE = 2**31 - 2**27
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Graph(nn.Module):
    """The embedding of one modality, as a function of its inputs in order."""

    def __init__(self, model: Any, modality: str, names: list[str]):
        super().__init__()
        self.model, self.modality, self.names = model, modality, names

    def forward(self, *values: Tensor) -> Tensor:
        return self.model.embeddings(self.modality, **dict(zip(self.names, values, strict=True)))


def export_onnx(folder: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Export each tower of a dual encoder, or of a model of many modalities, to ONNX.

    `vision_model.onnx` takes `pixel_values` and returns `image_embeds`, `text_model.onnx` takes `input_ids` (and
    `attention_mask`) and returns `text_embeds`, and so on, in float32, for batches of any size and texts of any
    length; embeddings are not normalised, as transformers' `get_*_features`. The folder has the processor, too, and
    `Embedder.from_pretrained(folder, engine="onnxruntime")` takes it.

    Each graph is run by ONNX Runtime on other batches than it was made with.

    Args:
        folder: as `convert` or `save_pretrained` wrote it.
        output: the new folder; it is written beside and moved into place.
        overwrite: replace an existing output.

    Raises:
        ValueError: the model embeds nothing, or a graph computes something else than the model.
        FileExistsError: there is an output already.
        ImportError: ONNX is not installed.
    """
    for name in ("onnxscript", "onnxruntime"):
        import_extra(name, "onnx", "Exporting to ONNX")
    folder = Path(folder)
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    if not isinstance(model, ContrastiveModel):
        raise ValueError(f"{folder}: towers are exported to ONNX, of which {type(model).__name__} has none alone.")
    processor: Any = AutoProcessor.from_pretrained(folder)
    towers: Any = model.towers
    modalities = [name for name in towers if name in processor.modalities]
    scale = getattr(model, "logit_scale", None)
    settings: dict[str, Any] = {
        "hfvlm": __version__,
        "logit_scale": None if scale is None else log(float(scale.exp().detach())),
        "modalities": {},
    }
    with new_folder(output, overwrite=overwrite) as target:
        for modality in modalities:
            settings["modalities"][modality] = write_tower(target, model, processor, modality)
        (target / ONNX_SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        model.config.save_pretrained(target)
        processor.save_pretrained(target)
        for modality in modalities:
            check_graph(OnnxRuntime(target), model, processor, modality)
        write_export_card(target, model.config, record_of(folder), Path(output).name, "as ONNX graphs")
    return Path(output)


@torch.no_grad()
def write_tower(folder: Path, model: Any, processor: Any, modality: str) -> dict[str, Any]:
    """Write the graph of one modality -> its entry in the settings."""
    inputs = prepared(processor, modality, [0, 1])
    names, values = list(inputs), tuple(inputs.values())
    graph, embeds = Graph(model, modality, names).eval(), f"{modality}_embeds"
    free = tuple({0: "batch"} | ({1: "length"} if name in TEXT_INPUTS else {}) for name in names)
    dimensions = {"batch": torch.export.Dim("batch", min=1), "length": torch.export.Dim.DYNAMIC}
    shapes = tuple({axis: dimensions[name] for axis, name in axes.items()} for axes in free)
    with quiet_exporter():
        program: Any = torch.onnx.export(
            graph, values, dynamo=True, dynamic_shapes=(shapes,), input_names=names, output_names=[embeds],
            verbose=False,
        )  # fmt: skip
    tower = model.towers[modality]
    name = tower if next(other for other, own in model.towers.items() if own == tower) == modality else modality
    path = folder / f"{name.removesuffix('_model')}_model.onnx"
    size = sum(parameter.nbytes for parameter in getattr(model, tower).parameters())
    program.save(path, external_data=size > LARGEST_FILE)
    width = graph(*values).shape[-1]
    kept = [each.name for each in program.model.graph.inputs]
    return {"file": path.name, "inputs": kept, "output": embeds, "size": width}


def prepared(processor: Any, modality: str, rows: list[int]) -> dict[str, Tensor]:
    """Prepare examples of a modality, as an `Embedder` does."""
    examples = samples(modality)
    options = {"padding": True, "truncation": True} if modality == "text" else {}
    return dict(processor.prepare(modality, [examples[row] for row in rows], **options))


@torch.no_grad()
def check_graph(engine: Any, model: Any, processor: Any, modality: str) -> None:
    """Compare a graph with the model, on batches of other sizes and texts of other lengths.

    Raises:
        ValueError: they differ.
    """
    for rows in ([0], [1], [1, 0, 1]):
        inputs: Mapping[str, Tensor] = prepared(processor, modality, rows)
        expected = model.embeddings(modality, **inputs)
        found = engine.embeddings(modality, **inputs)
        difference = float((found - expected).abs().max() / expected.abs().max())
        if found.shape != expected.shape or not difference <= TOLERANCE:
            raise ValueError(f"The graph of {modality} inputs differs from the model by {difference:.1e}.")


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Leave out what PyTorch's exporter tells of its own outdated calls, and of packages that no graph here needs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
