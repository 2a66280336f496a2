"""Checks of a folder that need nothing but the folder: what would show silent wrongness."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor, PreTrainedModel

TOLERANCE = 1e-5
TEXTS = ("a photo of a cat", "two dogs on a beach at night, seen from far away")


@dataclass(frozen=True)
class Check:
    """One fact about a folder. `error` is the largest difference, relative to the largest value."""

    name: str
    passed: bool
    detail: str
    error: float | None = None


def verify(folder: str | Path) -> list[Check]:
    """Load a folder in float32 and check that it is whole and consistent.

    Eager attention equals SDPA, a batch equals its rows, saving and loading changes nothing, each tower loaded alone
    equals the tower inside, the processor survives a round trip, and another picture gives another answer.
    """
    folder = Path(folder)
    model, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = [f"{len(keys)} {kind}" for kind, keys in info.items() if keys]
    checks = [Check("every weight of the model is in the file", not problems, ", ".join(problems) or "all")]
    processor = AutoProcessor.from_pretrained(folder)
    inputs = sample_inputs(processor)
    with torch.no_grad():
        expected = outputs_of(model.eval(), inputs)
        for name, actual in (
            ("eager attention equals sdpa", lambda: with_attention(model, inputs)),
            ("a batch equals its rows", lambda: row_by_row(model, inputs)),
            ("saving and loading changes nothing", lambda: outputs_of(saved_and_loaded(model), inputs)),
        ):
            checks.append(compare(name, actual, expected))
        checks += [tower_check(folder, model, name, inputs) for name in towers(model)]
        checks.append(sensitivity(model, inputs, expected))
    checks.append(processor_check(processor, inputs))
    return checks


def sample_inputs(processor: Any) -> dict[str, Tensor]:
    """Two pictures of noise and two texts."""
    noise = np.random.RandomState(0)
    pictures = [Image.fromarray(noise.randint(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((240, 320), (300, 180))]
    return dict(processor(images=pictures, text=list(TEXTS)))


def outputs_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in model(**inputs).items() if isinstance(value, Tensor)}


def with_attention(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if before != "eager" else "sdpa")
    try:
        return outputs_of(model, inputs)
    finally:
        model.set_attn_implementation(before)


def row_by_row(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings of each row alone; the logits follow from them."""
    rows = [outputs_of(model, {k: v[i : i + 1] for k, v in inputs.items()}) for i in range(len(TEXTS))]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0] if name.endswith("_embeds")}


def saved_and_loaded(model: PreTrainedModel) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        return type(model).from_pretrained(temporary, dtype=torch.float32).eval()


def towers(model: PreTrainedModel) -> list[str]:
    return [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]


def tower_check(folder: Path, model: PreTrainedModel, name: str, inputs: Mapping[str, Tensor]) -> Check:
    inside = getattr(model, name)
    alone = type(inside).from_pretrained(folder, dtype=torch.float32).eval()
    arguments = {key: value for key, value in inputs.items() if key.startswith("input_") == ("text" in name)}
    arguments.pop("attention_mask", None)
    return compare(
        f"{name} alone equals the one inside",
        lambda: outputs_of(alone, arguments),
        outputs_of(inside, arguments),
    )


def sensitivity(model: PreTrainedModel, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Check:
    changed = dict(inputs) | {"pixel_values": inputs["pixel_values"].flip(0)}
    difference = relative(outputs_of(model, changed)["logits_per_image"], expected["logits_per_image"])
    return Check("another picture gives another answer", difference > 1e-3, f"differs by {difference:.1%}", difference)


def processor_check(processor: Any, inputs: Mapping[str, Tensor]) -> Check:
    with tempfile.TemporaryDirectory() as temporary:
        processor.save_pretrained(temporary)
        again = sample_inputs(AutoProcessor.from_pretrained(temporary))
    same = again.keys() == inputs.keys() and all(torch.equal(again[name], inputs[name]) for name in inputs)
    return Check("the processor survives a round trip", same, "equal" if same else "its inputs differ")


def compare(name: str, actual: Callable[[], Mapping[str, Tensor]], expected: Mapping[str, Tensor]) -> Check:
    tensors = actual()
    error = max(relative(value, expected[key]) for key, value in tensors.items())
    return Check(name, error <= TOLERANCE, f"largest relative difference {error:.1e}", error)


def relative(actual: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|; NaN counts as infinite."""
    error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-12))
    return error if error == error else float("inf")
