"""The architectures by name: which classes each has, and which Auto class of transformers finds which of them.

Each architecture's `__init__.py` is its contents page, an `Architecture` that names its classes without importing one.
"""

import importlib
import importlib.abc
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_architectures: dict[str, "Architecture"] = {}
# Called with each architecture whose modules have been imported.
after_load: list[Callable[["Architecture"], None]] = []


@dataclass(frozen=True)
class Architecture:
    """The contents page of one architecture: which class is found by which Auto class.

    Args:
        module: the package, `__name__` in its `__init__.py`.
        configs: configuration classes by `model_type`; the first is the composite.
        models: model classes by the name of the Auto class that finds them.
        processor: the processor of the composite.
        processors: others that its checkpoints may name.
        image_processors: the composite's, and others that its checkpoints may name.
        tokenizers: likewise.
        feature_extractors: likewise.
        video_processors: likewise.
        lora: names of the layers that PEFT adapts by default.
    """

    module: str
    configs: dict[str, str]
    models: dict[str, tuple[str, ...]]
    processor: str | None = None
    processors: tuple[str, ...] = ()
    image_processors: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()
    feature_extractors: tuple[str, ...] = ()
    video_processors: tuple[str, ...] = ()
    lora: tuple[str, ...] = ("q_proj", "v_proj")
    _modules: list[ModuleType] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]

    @property
    def model_type(self) -> str:
        return next(iter(self.configs))

    @property
    def is_loaded(self) -> bool:
        """Whether its modules have been imported."""
        return bool(self._modules)

    @property
    def names(self) -> list[str]:
        """Every public class, in the order of the fields."""
        models = [name for names in self.models.values() for name in names]
        processors = [
            *self.processors,
            *self.image_processors,
            *self.tokenizers,
            *self.feature_extractors,
            *self.video_processors,
        ]
        every = [*self.configs.values(), *models, *([self.processor] if self.processor else []), *processors]
        return list(dict.fromkeys(every))

    def __getattr__(self, name: str) -> Any:
        """Return the class of that name, from whichever of the architecture's modules has it."""
        if name.startswith("_") or name not in self.names:
            raise AttributeError(f"{self.module} has no {name!r}; it has {', '.join(self.names)}.")
        return next(vars(module)[name] for module in self.load() if name in vars(module))

    def load(self) -> list[ModuleType]:
        """Import the architecture's modules, once, and return them."""
        if self._modules:
            return self._modules
        files = pkgutil.walk_packages(importlib.import_module(self.module).__path__, f"{self.module}.")
        modules = [importlib.import_module(file.name) for file in files]
        if not self._modules:  # no import among these has come back here
            self._modules.extend(modules)
            for action in after_load:
                action(self)
        return self._modules


def add(architecture: Architecture) -> None:
    """Take an architecture up under its folder's name."""
    _architectures[architecture.name] = architecture


def architectures() -> dict[str, Architecture]:
    """Return every architecture by its folder's name."""
    return _architectures


def architecture_of(model_type: str) -> Architecture:
    """Return the architecture that owns a `model_type`, a tower's included.

    Raises:
        ValueError: it is none of hfvlm's.
    """
    for architecture in _architectures.values():
        if model_type in architecture.configs:
            return architecture
    raise ValueError(f"{model_type} is no model_type of hfvlm; `hfvlm list` shows what there is.")


def find_class(name: str) -> Any:
    """Return the hfvlm class of that name, or None."""
    for architecture in _architectures.values():
        if name in architecture.names:
            return getattr(architecture, name)
    return None


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Run `action` on a module once it is imported, now if it is already: importing PEFT here would take a second."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, action))


class _AfterImport(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, action: Callable[[ModuleType], None]):
        self.name, self.action = name, action

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
