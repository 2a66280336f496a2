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
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hfvlm.checkpoints.tensor_bundle import variable_names
from tests.support.paths import OURS

GOLDENS = Path(os.environ.get("HFVLM_GOLDENS", OURS))


# Where a case's options are, whatever its kind.
SECTIONS = ("arguments", "config", "constructor", "generate")


class UnknownOptionError(AssertionError):
    """An option of a case that its runner does not know, and so would not act on."""


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
    errors: dict[str, float] = field(default_factory=dict)  # of floats, relative to the output's largest value
    checked: bool = False

    @cached_property
    def case(self) -> dict[str, Any]:
        """Read case.json; a section that is null is left out, as one that is absent."""
        return present(json.loads((self.folder / "case.json").read_text()))

    @property
    def architecture(self) -> str:
        """As the case says, or as the folder is called that it lies in."""
        return self.case.get("architecture", self.folder.parent.name)

    def section(self, path: str) -> Any:
        """Give a section by its dotted path, without what is null in it; `{}` where there is none."""
        section: Any = self.case
        for name in path.split("."):
            section = (section.get(name) if isinstance(section, Mapping) else None) or {}
        return present(section) if isinstance(section, Mapping) else section

    def check(self, **known: Collection[str]) -> None:
        """Refuse options that the runner would not act on: of each section, by its path with "__" for a dot, the
        names that it knows. Of sections that the first call leaves out, it knows none.

        Raises:
            UnknownOptionError: it names them, and those that are known.
        """
        others: dict[str, Collection[str]] = {} if self.checked else dict.fromkeys(SECTIONS, ())
        self.checked = True
        for path, names in (others | known).items():
            section = self.section(path.replace("__", "."))
            unknown = sorted(set(section) - set(names)) if isinstance(section, Mapping) else []
            if unknown:
                raise UnknownOptionError(
                    f"{self.folder.name}: {path.replace('__', '.')} has {', '.join(unknown)}; the runner knows "
                    f"{', '.join(sorted(names)) or 'none'}"
                )

    def mask(self, name: str = "attention_mask", ids: str = "input_ids") -> Tensor:
        """Give an attention mask among the inputs; where there is none, all ids are attended to."""
        return self.inputs[name] if name in self.inputs else torch.ones_like(self.inputs[ids])

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
        """Assert that `actual` is the stored output of that name, if it is stored; `mask` is True where it has a
        meaning."""
        if name not in self.outputs:
            return
        self.compared.add(name)
        expected, stored = self.outputs[name], self.description(name)
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
        self.errors[name] = error / max(expected[mask].double().abs().max().item(), 1e-12) if mask.any() else 0.0
        allowed = self.allowed(name, expected[mask])
        assert error <= allowed, f"{name}: differs by {error:.2e}, allowed is {allowed:.2e}"

    def allowed(self, name: str, expected: Tensor) -> float:
        """Give the largest difference that an output may have: the case's tolerance or, where float32 itself was
        further off in the original, three times that."""
        tolerance = self.tolerance
        largest = expected.double().abs().max().clamp_min(1e-12).item() if expected.numel() else 0.0
        unit = 1.0 if "absolute_error" in tolerance else largest
        stated = tolerance.get("absolute_error", tolerance.get("relative_error", 1e-4))
        return max(stated, 3 * self.noise.get(name, 0.0)) * unit

    @property
    def tolerance(self) -> dict[str, Any]:
        """As the case says it: a mapping, or words such as "1e-4 absolute" or "relative_error < 1e-5"."""
        stated = self.case.get("tolerance", {})
        if isinstance(stated, str):
            number = re.search(r"\d+(\.\d+)?e-\d+", stated)
            assert number, f"no tolerance can be read from {stated!r}"
            return {"absolute_error" if "absolute" in stated else "relative_error": float(number[0])}
        return stated

    @cached_property
    def noise(self) -> dict[str, float]:
        """How far an output of the original is off what float64 gives, in the tolerance's unit, where that is more
        than the tolerance. As the case says it, or as ours does that has the same outputs."""
        if "float32_noise" in self.case:
            return self.case["float32_noise"]
        ours = OURS / self.folder.parent.name / self.folder.name
        files = [folder / "outputs.safetensors" for folder in (self.folder, ours)]
        same = ours != self.folder and all(file.exists() for file in files)
        return Golden(ours).noise if same and files[0].read_bytes() == files[1].read_bytes() else {}

    def description(self, name: str) -> dict[str, Any]:
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


def present(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section without the entries that are null."""
    return {name: value for name, value in section.items() if value is not None}


def read_key_list(path: Path) -> dict[str, Tensor]:
    """A released file's keys as tensors without memory, out of the wrappers that a training puts around them."""
    return dict(_key_list(path) if path.is_relative_to(OURS) else _key_list.__wrapped__(path))


@cache
def _key_list(path: Path) -> dict[str, Tensor]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        rows = json.load(file)
    names = variable_names({row["key"]: row.get("variable", row["key"]) for row in rows})
    return unwrapped(
        {
            names[row["key"]]: torch.empty(row["shape"], dtype=getattr(torch, row["dtype"]), device="meta")
            for row in rows
        }
    )


# What a training puts around the names of the weights, and what it stores beside them.
WRAPPERS = (
    *(f"{name}{mark}" for name in ("state_dict", "model_state_dict", "model", "module") for mark in "/|"),
    *("state_dict.", "model_state_dict.", "module.", "_orig_mod."),
)
BESIDE = re.compile(r"(epoch|name|optimizer|lr_scheduler|scheduler|scaler|step|last_iter|iteration|args|config)\b")


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a reader of checkpoints opens a file: what all names of weights begin with is no part of them."""
    weights = {key: tensor for key, tensor in tensors.items() if not BESIDE.match(key)}
    for wrapper in WRAPPERS:
        if weights and all(key.startswith(wrapper) for key in weights):
            return unwrapped({key.removeprefix(wrapper): tensor for key, tensor in weights.items()})
    return tensors


def notes_of(path: Path) -> dict[str, Any]:
    """What is known of a released file, from the list beside its folder; a name that begins with "transformers" says
    that the file is of the class there, in its default sizes."""
    file = path.parent.parent / "full-notes.json"
    notes = json.loads(file.read_text()) if file.exists() else {}
    name, stem = path.name.removesuffix(".gz"), stem_of(path)
    native = {"model_type": path.parent.parent.name} if stem.startswith("transformers-") else {}
    return notes.get(name) or notes.get(stem) or native


def stem_of(path: Path) -> str:
    """What a released file is called in its list."""
    return path.name.removesuffix(".gz").removesuffix(".json")


def companions(path: Path) -> Iterator[Path]:
    """The key list itself, the others of its folder, and ours of the architecture, from which a folder that lacks a
    part borrows it."""
    yield path
    seen = {stem_of(path)}
    for folder in (path.parent, OURS / path.parent.parent.name / "full"):
        for other in sorted(folder.glob("*.json*")):
            if stem_of(other) not in seen:
                seen.add(stem_of(other))
                yield other


def parts_of(path: Path, role_of: Callable[[dict[str, Any], dict[str, Tensor]], str]) -> dict[str, Path]:
    """The files that make up a model with `path`, by their roles, which `role_of` tells from a list's notes and
    keys. Of several files of a role the nearest counts."""
    parts: dict[str, Path] = {}
    for other in companions(path):
        parts.setdefault(role_of(notes_of(other), read_key_list(other)), other)
    return parts


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
    """A processor case: `process(setting, path, shape)` -> (C, H, W). Yields each name that was compared."""
    case = golden.case
    for setting in case["settings"]:
        for image, media in case["media"].items():
            name = f"{setting}/{image}"
            shape = golden.section("full_shapes").get(name)
            pixels = process(golden.section(f"settings.{setting}"), golden.folder / media["file"], shape)
            assert shape is None or list(pixels.shape) == shape, name
            stride = case.get("stride", 1)
            golden.compare(f"{name}/strided", pixels[:, ::stride, ::stride])
            exact = pixels.double()
            golden.compare(f"{name}/mean", exact.mean(dim=(1, 2)))
            golden.compare(f"{name}/std", exact.std(dim=(1, 2), correction=0))
            yield name
