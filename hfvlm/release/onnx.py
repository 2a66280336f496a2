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
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Of images that come as patches.
PATCH_INPUTS = ("pixel_values", "pixel_attention_mask")


class Graph(nn.Module):
    """The embedding of one modality, as a function of its inputs in order."""

    def __init__(self, model: Any, modality: str, names: list[str]):
        super().__init__()
        self.model, self.modality, self.names = model, modality, names

    def forward(self, *values: Tensor) -> Tensor:
        return embedded(self.model, self.modality, dict(zip(self.names, values, strict=True)))


def embedded(model: Any, modality: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """Embed prepared inputs of one modality -> `(B, D)`, or `(B, N, D)` of tokens."""
    if isinstance(model, ContrastiveModel):
        return model.embeddings(modality, **inputs)
    return getattr(model, f"get_{modality}_features")(**inputs).pooler_output


def export_onnx(folder: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Export each tower of a dual encoder, or of a model of many modalities, to ONNX.

    `vision_model.onnx` takes `pixel_values` and returns `image_embeds`, `text_model.onnx` takes `input_ids` (and
    `attention_mask`) and returns `text_embeds`, and so on, in float32, for batches of any size, texts of any length
    and images of any number of patches, where the tower takes patches; embeddings are not normalised, as
    transformers' `get_*_features`. The folder has the processor, too, and
    `Embedder.from_pretrained(folder, engine="onnxruntime")` takes it.

    Each graph is run by ONNX Runtime on other batches than it was made with.

    Args:
        folder: as `convert` or `save_pretrained` wrote it.
        output: the new folder; it is written beside and moved into place.
        overwrite: replace an existing output.

    Raises:
        ValueError: the model does not embed texts and other inputs alone, or a graph computes something else than
            the model.
        FileExistsError: there is an output already.
        ImportError: ONNX is not installed.
    """
    for name in ("onnxscript", "onnxruntime"):
        import_extra(name, "onnx", "Exporting to ONNX")
    folder = Path(folder)
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    if not hasattr(model, "get_text_features"):
        raise ValueError(
            f"{folder}: towers that embed texts, and images or others, are exported to ONNX, each alone; "
            f"{type(model).__name__} has none of texts."
        )
    processor: Any = AutoProcessor.from_pretrained(folder)
    known = getattr(model, "modalities", processor.modalities)
    modalities = [name for name in known if name in processor.modalities]
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
            check_graph(OnnxRuntime(target, [modality]), model, processor, modality)
        write_export_card(target, model.config, record_of(folder), Path(output).name, "as ONNX graphs")
    return Path(output)


@torch.no_grad()
def write_tower(folder: Path, model: Any, processor: Any, modality: str) -> dict[str, Any]:
    """Write the graph of one modality -> its entry in the settings."""
    inputs = prepared(processor, modality, [0, 1])
    names, values = list(inputs), tuple(inputs.values())
    graph, embeds = Graph(model, modality, names).eval(), f"{modality}_embeds"
    with quiet_exporter():
        program: Any = torch.onnx.export(
            graph, values, dynamo=True, dynamic_shapes=(free_sizes(names),), input_names=names,
            output_names=[embeds], verbose=False,
        )  # fmt: skip
    path = folder / f"{'vision' if modality == 'image' else modality}_model.onnx"
    program.save(path)  # weights that a file of protobuf cannot hold go into one of their own
    width = graph(*values).shape[-1]
    kept = [each.name for each in program.model.graph.inputs]
    return {"file": path.name, "inputs": kept, "output": embeds, "size": width}


def free_sizes(names: list[str]) -> tuple[dict[int, Any], ...]:
    """Return the dimensions of each input that are free: the batch, and the length of texts and of patches."""
    sequences = TEXT_INPUTS + (PATCH_INPUTS if "pixel_attention_mask" in names else ())
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim.DYNAMIC
    return tuple({0: batch} | ({1: length} if name in sequences else {}) for name in names)


def prepared(processor: Any, modality: str, rows: list[int], **options: Any) -> dict[str, Tensor]:
    """Prepare examples of a modality, as an `Embedder` does; `options` are of the processor."""
    examples = samples(modality)
    options |= {"padding": True, "truncation": True} if modality == "text" else {}
    return dict(processor.prepare(modality, [examples[row] for row in rows], **options))


@torch.no_grad()
def check_graph(engine: Any, model: Any, processor: Any, modality: str) -> None:
    """Compare a graph with the model, on batches of other sizes, and of other numbers of tokens or patches.

    Raises:
        ValueError: they differ.
    """
    options: dict[str, Any] = {}
    if modality == "image" and (patches := getattr(processor.image_processor, "max_num_patches", None)):
        options["max_num_patches"] = max(1, patches // 2)
    for rows in ([0], [1], [1, 0, 1]):
        inputs = prepared(processor, modality, rows, **options)
        expected = embedded(model, modality, inputs)
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
