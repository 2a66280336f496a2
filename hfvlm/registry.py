"""Makes transformers' Auto classes, PEFT and the pipelines know every architecture, without importing one.

Each architecture's `__init__.py` is its contents page: an `Architecture` that names its classes. A stand-in of each
name goes into each of the Auto classes' tables as soon as transformers has made that table: at `import hfvlm` where
transformers is imported already, else when something imports it, so that `hfvlm --help` waits for neither transformers
nor torch. The first use of a stand-in, or the first configuration that is made, loads the architecture and registers
the classes themselves.
"""

import importlib
import importlib.abc
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import hfvlm.models

# The Auto classes whose tables hold stand-ins, by the module of transformers that makes the table.
AUTO_MODULE = "transformers.models.auto.{}_auto"
TABLES = (
    "configuration", "tokenization", "image_processing", "video_processing", "feature_extraction", "processing"
)  # fmt: skip

_architectures: dict[str, "Architecture"] = {}


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
        """The class of that name, from whichever of the architecture's modules has it."""
        if name.startswith("_") or name not in self.names:
            raise AttributeError(f"{self.module} has no {name!r}; it has {', '.join(self.names)}.")
        return next(vars(module)[name] for module in self.load() if name in vars(module))

    @cached_property
    def stand_ins(self) -> dict[str, type]:
        return {name: _StandIn(name, (), {"__module__": self.module, "architecture": self}) for name in self.names}

    def load(self) -> list[ModuleType]:
        """The modules; the first time they are imported, and their classes registered."""
        if self._modules:
            return self._modules
        files = pkgutil.iter_modules(importlib.import_module(self.module).__path__)
        modules = [importlib.import_module(f"{self.module}.{file.name}") for file in files]
        if not self._modules:  # no import among these has come back here
            self._modules.extend(modules)
            classes = {name: getattr(self, name) for name in self.names}
            for table in TABLES:
                self.register_in(table, importlib.import_module(AUTO_MODULE.format(table)), classes)
            for auto, names in self.models.items():
                by_config: dict[type, list[type]] = {}
                for model in (getattr(self, name) for name in names):
                    by_config.setdefault(model.config_class, []).append(model)
                for config, models in by_config.items():
                    _register_models(getattr(importlib.import_module("transformers"), auto), config, models)
        return self._modules

    def announce(self, table: str, module: Any) -> None:
        """Put the stand-ins into one of TABLES, where the classes will be."""
        self.register_in(table, module, self.stand_ins)

    def register_in(self, table: str, module: Any, classes: dict[str, type]) -> None:
        """Put everything that transformers may look for by name into one of TABLES, which `module` has made.

        `exist_ok`: an upstream class of the same name, or an earlier call, is no error, and the classes of hfvlm
        folders stay hfvlm's.
        """
        configs = [classes[name] for name in self.configs.values()]
        if table == "configuration":
            for model_type, config in zip(self.configs, configs, strict=True):
                module.AutoConfig.register(model_type, config, exist_ok=True)
            return
        names, register = {
            "processing": (self._processors, lambda key, kind: _table(module.PROCESSOR_MAPPING, key, kind)),
            "tokenization": (
                self.tokenizers,
                lambda key, kind: module.AutoTokenizer.register(key, tokenizer_class=kind, exist_ok=True),
            ),
            "image_processing": (
                self.image_processors,
                lambda key, kind: _table(module.IMAGE_PROCESSOR_MAPPING, key, _backends(kind)),
            ),
            "video_processing": (
                self.video_processors,
                lambda key, kind: _table(module.VIDEO_PROCESSOR_MAPPING, key, _backends(kind)),
            ),
            "feature_extraction": (
                self.feature_extractors,
                lambda key, kind: _table(module.FEATURE_EXTRACTOR_MAPPING, key, kind),
            ),
        }[table]
        # A table has one entry a configuration; the other names stand under configurations of their own towers.
        for key, name in zip(configs, names, strict=False):
            if name is not None:
                register(key, classes[name])

    @property
    def _processors(self) -> tuple[str | None, ...]:
        """The composite's, which it may lack, and the others."""
        return self.processor, *self.processors


def _register_models(auto: Any, config: type, models: list[type]) -> None:
    """Of several models of one configuration, `config.architectures` selects; the first is the default."""
    auto.register(config, models[0], exist_ok=True)
    if len(models) > 1:
        _table(auto._model_mapping, config, Models(models))


class Models(tuple[type, ...]):
    """Several models in the place of one; transformers 5.4's pipelines ask what is there for its name."""

    @property
    def __name__(self) -> str:
        return self[0].__name__


def _table(mapping: Any, key: type, value: Any) -> None:
    mapping.register(key, value, exist_ok=True)


def _backends(processor: type) -> dict[str, type]:
    """transformers asks for the torchvision backend first; ours is the same class either way."""
    return {"torchvision": processor, "pil": processor}


class _StandIn(type):
    """The metaclass of stand-ins: whatever is asked of one is asked of the class that it stands for."""

    architecture: Architecture

    def real(cls) -> Any:
        return getattr(cls.architecture, cls.__name__)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.real(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.real()(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.real())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.real())


def register() -> None:
    """Register every architecture. `import hfvlm` calls it; calling it again changes nothing.

    Also the entry point of vLLM's plugin mechanism (`vllm.general_plugins`).
    """
    if _architectures:
        return
    for name in hfvlm.models.ARCHITECTURES:
        architecture = importlib.import_module(f"hfvlm.models.{name}").architecture
        _architectures[name] = architecture
    for table in TABLES:
        after_import(AUTO_MODULE.format(table), partial(_announce, table))
    after_import("peft.utils.constants", _register_lora)
    after_import("transformers.pipelines", _register_pipelines)
    after_import("transformers.trainer", _guard_trainer)
    after_import("peft.peft_model", _guard_peft)


def architectures() -> dict[str, Architecture]:
    """Every architecture by its folder's name."""
    register()
    return _architectures


def architecture_of(model_type: str) -> Architecture:
    """The architecture that owns a `model_type`, a tower's included.

    Raises:
        ValueError: it is none of hfvlm's.
    """
    for architecture in architectures().values():
        if model_type in architecture.configs:
            return architecture
    raise ValueError(f"{model_type} is no model_type of hfvlm; `hfvlm list` shows what there is.")


def load_for(model_type: str) -> None:
    """Load the architecture that owns a `model_type`, if it is one of hfvlm's."""
    for architecture in _architectures.values():
        if model_type in architecture.configs:
            architecture.load()


def find_class(name: str) -> Any:
    """The hfvlm class of that name, or None."""
    for architecture in _architectures.values():
        if name in architecture.names:
            return getattr(architecture, name)
    return None


def _announce(table: str, module: ModuleType) -> None:
    for architecture in _architectures.values():
        architecture.announce(table, module)


def _register_pipelines(_: ModuleType) -> None:
    from hfvlm.inference.pipelines import register_pipelines

    register_pipelines()


def _guard_trainer(trainer: ModuleType) -> None:
    from hfvlm.release.publishing import guard_trainer

    guard_trainer(trainer)


def _guard_peft(peft_model: ModuleType) -> None:
    from hfvlm.release.publishing import guard_peft

    guard_peft(peft_model)


def _register_lora(constants: ModuleType) -> None:
    """PEFT's table of the layers that `LoraConfig()` adapts when it names none, by `model_type`."""
    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for architecture in _architectures.values():
        table |= {model_type: list(architecture.lora) for model_type in architecture.configs}


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
