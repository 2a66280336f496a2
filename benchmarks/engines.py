"""Programs that run a tower in float32: PyTorch, the same with packed weights, ONNX Runtime and OpenVINO.

python -m benchmarks.engines [--quick] [--rounds 7] [--page] [--output engines.json]
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

import hfvlm
from benchmarks.measuring import Item, Options, Run, Size
from benchmarks.models import PATCHES, WIDE, config, pixels, seeded, tokens, trimmed
from benchmarks.report import main
from hfvlm.inference.engines import ENGINES, ONNX_SETTINGS
from hfvlm.presets import load_preset
from hfvlm.release.onnx import write_tower

# What is embedded: a model, one of its modalities, and how many at a time.
CASES = {
    "clip": {"image": (1, 8), "text": (1, 16)},
    "siglip": {"image": (1, 8), "text": (1, 16)},
    "imagebind": {"image": (1, 8), "text": (1, 16), "audio": (8,)},
}
QUICK = {"clip": {"text": (3,)}}


class Inputs:
    """Random inputs of a model's towers, in place of what a processor prepares."""

    def __init__(self, model: Any):
        self.model = model

    def prepare(self, modality: str, rows: Any, **options: Any) -> dict[str, Tensor]:
        return batch(self.model, modality, len(rows))


def rows(size: Size) -> Iterator[Item]:
    for name, modalities in size.pick(QUICK, CASES).items():
        model = seeded(AutoModel.from_config, settings(name, size), size)
        packed = copy.deepcopy(model)
        hfvlm.optimize(packed)
        with TemporaryDirectory() as folder:
            written = {modality: write_tower(Path(folder), model, Inputs(model), modality) for modality in modalities}
            told = {"logit_scale": None, "modalities": written}
            (Path(folder) / ONNX_SETTINGS).write_text(json.dumps(told), encoding="utf-8")
            model.config.save_pretrained(folder)
            models = {"hfvlm": model, "optimize": packed} | {each: make(folder) for each, make in ENGINES.items()}
            for modality, counts in modalities.items():
                for count in counts:
                    inputs = batch(model, modality, count)
                    ways = {way: encoding(each, modality, inputs) for way, each in models.items()}
                    yield Options(f"{name}, {modality}, {count} at a time", ways, tolerance=1e-4)


def settings(name: str, size: Size) -> Any:
    if name != "imagebind":
        return config(name, size)
    fields = dict(load_preset("imagebind/tiny").config)
    larger = {"vision": PATCHES, "audio": WIDE | {"num_mel_bins": 128}, "text": WIDE | {"max_position_embeddings": 77}}
    for part, values in ({} if size.quick else larger).items():
        fields[f"{part}_config"] = fields[f"{part}_config"] | values
    return AutoConfig.for_model("hfvlm_imagebind", **fields)


def batch(model: Any, modality: str, count: int) -> dict[str, Tensor]:
    if modality == "text":
        texts = tokens(model, count)
        # SigLIP's texts are padded to full length, and padding is attended to.
        return texts if model.config.model_type == "hfvlm_siglip" else trimmed(texts)
    if modality == "image":
        return {"pixel_values": pixels(model, count)}
    audio = model.config.audio_config
    shape = (count, 3, 1, audio.num_mel_bins, audio.num_frames)
    return {"input_features": torch.randn(shape, generator=torch.Generator().manual_seed(3))}


def encoding(model: Any, modality: str, inputs: dict[str, Tensor]) -> Run:
    return torch.inference_mode()(lambda: model.embeddings(modality, **inputs))


if __name__ == "__main__":
    main({"engines": rows}, __doc__)
