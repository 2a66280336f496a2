"""Golden cases: what an original implementation computes on weights that anyone can regenerate.

A case is a folder of `case.json` (what was run, in the original's own names), `spec.json` (its state dict's keys,
shapes and dtypes in order), `buffers.safetensors` (tensors that are not synthesised), `inputs.safetensors` and
`outputs.safetensors`; any but the first may be absent. The weights are made from each key, its shape and the seed.
"""

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hfvlm.tensor_bundle import variable_names

GOLDENS = Path(os.environ.get("HFVLM_GOLDENS", Path(__file__).parent / "goldens"))


def case_folders() -> list[Path]:
    return sorted(path.parent for path in GOLDENS.rglob("case.json"))


def key_lists() -> list[Path]:
    return sorted(path for path in GOLDENS.rglob("full/*") if path.name.endswith((".json", ".json.gz")))


def name_of(path: Path) -> str:
    return str(path.relative_to(GOLDENS))


def synthesize_tensor(key: str, shape: list[int], seed: int) -> Tensor:
    """One float32 weight, of a size that keeps activations alive in a deep network."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    state = np.random.RandomState(np.frombuffer(digest[:16], dtype=np.uint32))
    noise = state.standard_normal(int(np.prod(shape, dtype=np.int64))).reshape(shape)
    name = key.rsplit(".", 1)[-1]
    if name == "running_var":
        value = 1.0 + 0.1 * np.abs(noise)
    elif name == "running_mean":
        value = 0.1 * noise
    elif "logit_scale" in key or name in ("temp", "temperature"):
        value = np.full(shape, 0.07 if name in ("temp", "temperature") else 2.6592)
    elif len(shape) >= 2:
        fan_in = int(np.prod(shape[1:], dtype=np.int64))
        small = "embed" in key or "pos" in name or "token" in name or "quer" in name
        value = noise * (0.2 if small else fan_in**-0.5)
    elif name in ("weight", "gamma") and len(shape) == 1:
        value = 1.0 + 0.1 * noise
    else:
        value = 0.1 * noise
    return torch.from_numpy(np.asarray(value, dtype=np.float32).reshape(shape))


@dataclass
class Golden:
    """One case, and the account of what has been compared."""

    folder: Path
    compared: set[str] = field(default_factory=set)

    @cached_property
    def case(self) -> dict[str, Any]:
        return json.loads((self.folder / "case.json").read_text())

    @property
    def architecture(self) -> str:
        """As the case says, or as the folder is called that it lies in."""
        return self.case.get("architecture", self.folder.parent.name)

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        path = self.folder / "spec.json"
        kept, seed = self._tensors("buffers"), self.case.get("seed", 0)
        rows = json.loads(path.read_text()) if path.exists() else []
        return {
            row["key"]: kept[row["key"]] if row["key"] in kept else synthesize_tensor(row["key"], row["shape"], seed)
            for row in rows
        }

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self._tensors("inputs")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return self._tensors("outputs")

    def _tensors(self, name: str) -> dict[str, Tensor]:
        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}

    def compare(self, name: str, actual: Tensor, mask: Tensor | None = None) -> None:
        """Assert that `actual` is the stored output of that name; `mask` is True where it has a meaning."""
        self.compared.add(name)
        expected, stored = self.outputs[name], self._description(name)
        actual = actual.detach().to(expected.dtype)
        mask = torch.ones_like(actual, dtype=torch.bool) if mask is None else mask.expand_as(actual)
        if shape := stored.get("shape"):
            assert list(actual.shape) == list(shape), f"{name}: shape {list(actual.shape)}, the original's is {shape}"
        if stride := stored.get("flatten_stride"):
            actual, mask = actual.flatten()[::stride], mask.flatten()[::stride]
        assert actual.shape == expected.shape, (
            f"{name}: {tuple(actual.shape)}, the original's is {tuple(expected.shape)}"
        )
        if not expected.is_floating_point():
            assert torch.equal(actual[mask], expected[mask]), f"{name}: differs"
            return
        error = (actual.double() - expected.double())[mask].abs().max().item() if mask.any() else 0.0
        tolerance = self.tolerance
        if "absolute_error" in tolerance:
            allowed = tolerance["absolute_error"]
        else:
            allowed = (
                tolerance.get("relative_error", 1e-4) * expected[mask].double().abs().max().clamp_min(1e-12).item()
            )
        assert error <= allowed, f"{name}: differs by {error:.2e}, allowed is {allowed:.2e}"

    @property
    def tolerance(self) -> dict[str, float]:
        """As the case says it: a mapping, or words such as "1e-4 absolute" or "relative_error < 1e-5"."""
        stated = self.case.get("tolerance", {})
        if isinstance(stated, str):
            number = re.search(r"\d+(\.\d+)?e-\d+", stated)
            assert number, f"no tolerance can be read from {stated!r}"
            return {"absolute_error" if "absolute" in stated else "relative_error": float(number[0])}
        return stated

    def _description(self, name: str) -> dict[str, Any]:
        described = self.case.get("outputs", {})
        stored = described.get(name, {}) if isinstance(described, dict) else {}
        if isinstance(stored, list):  # a shape
            return {"shape": stored}
        return stored if isinstance(stored, dict) else {}

    def in_order(self) -> list[str]:
        """Names of the outputs in the order of the computation, so that the first wrong one is named first."""
        described = self.case.get("outputs", {})
        names = [name for name in described if name in self.outputs] if isinstance(described, dict) else []
        return names + sorted(set(self.outputs) - set(names))


def read_key_list(path: Path) -> dict[str, Tensor]:
    """A released file's keys as tensors without memory."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        rows = json.load(file)
    names = variable_names({row["key"]: row.get("variable", row["key"]) for row in rows})
    return {
        names[row["key"]]: torch.empty(row["shape"], dtype=getattr(torch, row["dtype"]), device="meta") for row in rows
    }


def notes_of(path: Path) -> dict[str, Any]:
    """What is known of a released file, from the list beside its folder; a name that begins with "transformers" says
    that the file is of the class there, in its default sizes."""
    notes = json.loads((path.parent.parent / "full-notes.json").read_text())
    name, stem = path.name.removesuffix(".gz"), path.name.removesuffix(".gz").removesuffix(".json")
    native = {"model_type": path.parent.parent.name} if stem.startswith("transformers-") else {}
    return notes.get(name) or notes.get(stem, native)


class Recorder:
    """Outputs of modules by their paths, while a model runs: `with Recorder(model, paths) as seen: ...`."""

    def __init__(self, model: nn.Module, paths: list[str]):
        self.seen: dict[str, Any] = {}
        self.handles = [model.get_submodule(path).register_forward_hook(self._hook(path)) for path in paths]

    def _hook(self, path: str) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.seen[path] = output[0] if isinstance(output, tuple) else output
            self.seen[f"{path}:input"] = args[0] if args else None

        return record

    def __enter__(self) -> dict[str, Any]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def compare_pixels(golden: Golden, process: Any) -> Iterator[str]:
    """A processor case: `process(setting, path)` -> (C, H, W). Yields each name that was compared."""
    case = golden.case
    for setting in case["settings"]:
        for picture, media in case["media"].items():
            pixels = process(case["settings"][setting], golden.folder / media["file"])
            name = f"{setting}/{picture}"
            assert list(pixels.shape) == case["full_shapes"][name], name
            stride = case.get("stride", 1)
            golden.compare(f"{name}/strided", pixels[:, ::stride, ::stride])
            exact = pixels.double()
            golden.compare(f"{name}/mean", exact.mean(dim=(1, 2)))
            golden.compare(f"{name}/std", exact.std(dim=(1, 2), correction=0))
            yield name
