"""Compares a converted model with the numbers that its authors' README prints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor

from hfvlm.presets import list_presets, load_preset
from hfvlm.release.records import Check, unchecked

NAME = "the authors' published numbers"
# The authors print what a GPU gave, some of it in half precision.
TOLERANCE = 1e-2


def published_checks(folder: Path, examples: str | Path | None = None) -> list[Check]:
    """Compare with what the preset has of the README; none for a model that was converted from no preset."""
    preset = getattr(AutoConfig.from_pretrained(folder), "preset", None)
    if preset not in list_presets():
        return []
    published = load_preset(preset).source.get("published")
    if not published:
        return [unchecked(NAME, f"none are on record for {preset}")]
    place = Path(examples) if examples is not None else folder
    absent = [name for name in files_of(published) if not (place / name).is_file()]
    if absent:
        reason = f"{published['readme']} prints some for {', '.join(absent)}, not in {place}; name their folder"
        return [unchecked(NAME, reason)]
    return [published_check(folder, published, place)]


def files_of(published: Mapping[str, Any]) -> list[str]:
    """Return the names of the media that the README feeds the model; texts are in the preset."""
    return [name for modality, names in published["inputs"].items() if modality != "text" for name in names]


@torch.no_grad()
def published_check(folder: Path, published: Mapping[str, Any], place: Path) -> Check:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs: dict[str, Any] = {}
    for modality, sources in published["inputs"].items():
        given = sources if modality == "text" else [place / name for name in sources]
        inputs |= processor.prepare(modality, given)
    output = model(**inputs)
    errors = [
        float((logits(output, *pair["of"]).softmax(dim=-1) - torch.tensor(pair["values"])).abs().max())
        for pair in published["probabilities"]
    ]
    error = max(errors)
    return Check(NAME, error <= TOLERANCE, f"{published['readme']}: largest difference {error:.1e}", error)


def logits(output: Any, a: str, b: str) -> Tensor:
    return output.logits(a, b) if hasattr(output, "modalities") else output[f"logits_per_{a}"]
