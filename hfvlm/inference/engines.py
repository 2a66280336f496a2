"""Models that other programs than PyTorch run, from the ONNX graphs of `hfvlm.export(..., to="onnx")`."""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from hfvlm.media.sources import import_extra
from hfvlm.modeling.dual_encoder import ContrastiveModel
from hfvlm.registry import find_class

ONNX_SETTINGS = "onnx.json"


class ExportedTower:
    """The graph of one modality, where an `Embedder` looks for a tower."""

    def __init__(self, path: Path, entry: dict[str, Any]):
        self.path, self.inputs, self.output = path, entry["inputs"], entry["output"]
        self.config: Any = PreTrainedConfig()
        self.config.projection_dim = entry["size"]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the bytes of the graph and of its weights, of which content hashes are made."""
        files = sorted(self.path.parent.glob(f"{self.path.name}*"))
        return {file.name: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in files}


class ExportedModel(ABC):
    """Towers in ONNX, as an `Embedder` calls a model; a subclass runs them.

    Args:
        folder: of `hfvlm.export(..., to="onnx")`.
        modalities: those that are read, by default all.

    Raises:
        FileNotFoundError: the folder has no graphs.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, folder: str | Path, modalities: Any = None):
        path = Path(folder) / ONNX_SETTINGS
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder}: has no {ONNX_SETTINGS}; `hfvlm export FOLDER --to onnx -o OUTPUT` writes such folders."
            )
        settings = json.loads(path.read_text(encoding="utf-8"))
        known = settings["modalities"]
        self.config = AutoConfig.from_pretrained(folder)
        self.modalities = tuple(name for name in known if modalities is None or name in modalities)
        self.towers = {name: f"{name}_graph" for name in self.modalities}
        self.sessions: dict[str, Any] = {}
        for name in self.modalities:
            setattr(self, self.towers[name], tower := ExportedTower(Path(folder) / known[name]["file"], known[name]))
            self.sessions[name] = self.load(tower)
        if settings["logit_scale"] is not None:
            self.logit_scale = torch.tensor(settings["logit_scale"])
        self.kind = find_class((self.config.architectures or [""])[0])
        if hasattr(self.kind, "score"):
            self.score = self.kind.score

    def eval(self) -> "ExportedModel":
        """Return the model, which is in inference mode always."""
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return the bytes of all graphs; see `ExportedTower.state_dict`."""
        return {
            name: part for tower in self.towers.values() for name, part in getattr(self, tower).state_dict().items()
        }

    def embeddings(self, modality: str, **inputs: Tensor) -> Tensor:
        """Embed a batch of inputs that the processor prepared -> `(B, D)`, or `(B, N, D)` of tokens.

        Raises:
            TypeError: the graph has no such input, or needs another.
        """
        names = getattr(self, self.towers[modality]).inputs
        if missing := sorted(set(names) - set(inputs)):
            raise TypeError(f"The graph of {modality} inputs needs {', '.join(missing)}.")
        values = {name: inputs[name].contiguous().numpy() for name in names}
        return torch.from_numpy(self.run(self.sessions[modality], values))

    @abstractmethod
    def load(self, tower: ExportedTower) -> Any:
        """Prepare a tower's graph to be run."""

    @abstractmethod
    def run(self, session: Any, values: dict[str, Any]) -> Any:
        """Run a prepared graph on arrays by name -> an array."""


class OnnxRuntime(ExportedModel):
    """Towers in ONNX Runtime, on the CPU."""

    def load(self, tower: ExportedTower) -> Any:
        runtime = import_extra("onnxruntime", "onnx", 'engine="onnxruntime"')
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return runtime.InferenceSession(str(tower.path), options, providers=["CPUExecutionProvider"])

    def run(self, session: Any, values: dict[str, Any]) -> Any:
        return session.run(None, values)[0]


class OpenVINO(ExportedModel):
    """Towers in OpenVINO, on the CPU, in float32: by itself it rounds to bfloat16 where the processor has it."""

    def load(self, tower: ExportedTower) -> Any:
        openvino = import_extra("openvino", "openvino", 'engine="openvino"')
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        return openvino.Core().compile_model(str(tower.path), "CPU", options)

    def run(self, session: Any, values: dict[str, Any]) -> Any:
        return session(values)[0].copy()


ENGINES: dict[str, type[ExportedModel]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVINO}


def load_engine(engine: str, folder: str | Path, modalities: Any = None, **options: Any) -> ExportedModel:
    """Load exported towers for one of `ENGINES`.

    Args:
        options: of `Embedder.from_pretrained`; engines run on the CPU in float32 and take no others.

    Raises:
        ValueError: there is no such engine, or an option that it cannot follow, or the model's embeddings are not
            compared with each other.
        FileNotFoundError: the folder has no graphs.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is none of torch, {', '.join(ENGINES)}.")
    fixed = {"device": ("auto", "cpu"), "dtype": ("auto", "float32", torch.float32), "optimize": (False,)}
    for name, value in options.items():
        if value not in fixed.get(name, ()):
            raise ValueError(f'{name}={value!r} is for engine="torch": {engine} runs on the CPU in float32.')
    model = ENGINES[engine](folder, modalities)
    if model.kind is not None and not issubclass(model.kind, ContrastiveModel):
        raise ValueError(
            f"{folder}: {model.kind.__name__} compares its embeddings with those of a joint encoder, not with each "
            f"other: run its graphs ({ONNX_SETTINGS} lists them) without an Embedder."
        )
    return model
