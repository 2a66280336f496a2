"""Registers every architecture with transformers' Auto classes and pipelines and with PEFT, without importing one.

A stand-in of each class goes into each of the Auto classes' tables as soon as transformers has made that table: at
`import hfvlm` where transformers is imported already, else when something imports it, so that `hfvlm --help` waits for
neither transformers nor torch. The first use of a stand-in, or the first configuration that is made, loads the
architecture and registers the classes themselves. (Configurations are stand-ins, too: while transformers makes its
tables, its own configurations cannot be imported, and some of ours contain those.)
"""

import importlib
import sys
from collections.abc import Mapping
from functools import cache, partial
from types import ModuleType
from typing import Any

from hfvlm import registry
from hfvlm.models import ARCHITECTURES
from hfvlm.registry import Architecture, after_import, architectures

AUTO_MODULE = "transformers.models.auto.{}_auto"
# The tables that hold stand-ins, by the module of transformers that makes each.
TABLES = (
    "configuration", "tokenization", "image_processing", "video_processing", "feature_extraction", "processing"
)  # fmt: skip


def register() -> None:
    """Register every architecture. `import hfvlm` calls it; calling it again changes nothing."""
    if architectures():
        return
    for name in ARCHITECTURES:
        registry.add(importlib.import_module(f"hfvlm.models.{name}").architecture)
    registry.after_load.append(_register_classes)
    for table in TABLES:
        after_import(AUTO_MODULE.format(table), partial(_register_stand_ins, table))
    after_import("hfvlm.configuration", lambda module: module.before_use.append(_load_owner))
    # The first of these executes transformers' first module again, and puts another object in its place.
    after_import("transformers.processing_utils", _name_stand_ins)
    if "transformers.processing_utils" not in sys.modules:
        after_import("transformers", _name_stand_ins)
    after_import("transformers.models.auto.modeling_auto", _name_chat_models)
    after_import("peft.utils.constants", _register_lora)
    after_import("transformers.pipelines", _register_pipelines)
    after_import("transformers.trainer", _guard_trainer)
    after_import("peft.peft_model", _guard_peft)


def _load_owner(model_type: str) -> None:
    for architecture in architectures().values():
        if model_type in architecture.configs:
            architecture.load()


def _register_stand_ins(table: str, module: ModuleType) -> None:
    for name, architecture in architectures().items():
        register_in(table, module, architecture, _stand_ins(name))


@cache
def _stand_ins(name: str) -> dict[str, type]:
    architecture = architectures()[name]
    about = {"__module__": architecture.module, "architecture": architecture}
    return {name: _StandIn(name, (), about) for name in architecture.names}


def _register_classes(architecture: Architecture) -> None:
    """Put the classes of a loaded architecture where their stand-ins are, and its models into their tables."""
    classes = {name: getattr(architecture, name) for name in architecture.names}
    _name(classes)
    for table in TABLES:
        register_in(table, importlib.import_module(AUTO_MODULE.format(table)), architecture, classes)
    for auto, names in architecture.models.items():
        by_config: dict[type, list[Any]] = {}
        for name in names:
            by_config.setdefault(classes[name].config_class, []).append(classes[name])
        for config, models in by_config.items():
            _register_models(getattr(importlib.import_module("transformers"), auto), config, models)


def _register_models(auto: Any, config: type, models: list[type]) -> None:
    """Register the models of one configuration; `config.architectures` selects, the first is the default."""
    auto.register(config, models[0], exist_ok=True)
    if len(models) > 1:
        _put(auto._model_mapping, config, Models(models))


def register_in(table: str, module: Any, architecture: Architecture, classes: Mapping[str, type]) -> None:
    """Put everything that transformers may look for by name into one of TABLES, which `module` has made.

    `exist_ok`: an upstream class of the same name, or an earlier call, is no error, and the classes of hfvlm folders
    stay hfvlm's.
    """
    configs = [classes[name] for name in architecture.configs.values()]
    if table == "configuration":
        for model_type, config in zip(architecture.configs, configs, strict=True):
            module.AutoConfig.register(model_type, config, exist_ok=True)
        return
    names, register = {
        "processing": (
            (architecture.processor, *architecture.processors),  # the composite's, which it may lack, and the others
            lambda key, kind: _put(module.PROCESSOR_MAPPING, key, kind),
        ),
        "tokenization": (
            architecture.tokenizers,
            lambda key, kind: module.AutoTokenizer.register(key, tokenizer_class=kind, exist_ok=True),
        ),
        "image_processing": (
            architecture.image_processors,
            lambda key, kind: _put(module.IMAGE_PROCESSOR_MAPPING, key, _backends(kind)),
        ),
        "video_processing": (
            architecture.video_processors,
            lambda key, kind: _put(module.VIDEO_PROCESSOR_MAPPING, key, _backends(kind)),
        ),
        "feature_extraction": (
            architecture.feature_extractors,
            lambda key, kind: _put(module.FEATURE_EXTRACTOR_MAPPING, key, kind),
        ),
    }[table]
    # A table has one entry a configuration; the other names stand under configurations of their own towers.
    for key, name in zip(configs, names, strict=False):
        if name is not None:
            register(key, classes[name])


def _name_stand_ins(_: ModuleType) -> None:
    _name({name: kind for architecture in architectures() for name, kind in _stand_ins(architecture).items()})


def _name(classes: Mapping[str, type]) -> None:
    """Name classes in `transformers` itself, where TRL, vLLM and others look for those of a folder's `architectures`.

    The module that they have imported may be another object than the one that is imported now.
    """
    held = [sys.modules.get("transformers")]
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        held += [names.get("transformers"), names.get("transformers_module")]
    hosts = {id(host): host for host in held if isinstance(host, ModuleType) and host.__name__ == "transformers"}
    for host in hosts.values():
        for name, kind in classes.items():
            setattr(host, name, kind)


def _name_chat_models(module: ModuleType) -> None:
    """Name the models that chat in the table by which `transformers serve` knows them."""
    for architecture in architectures().values():
        for name in architecture.models.get("AutoModelForImageTextToText", ()):
            module.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault(name, name)


class Models(tuple[type, ...]):
    """Several models in the place of one; transformers 5.4's pipelines read the name of what is there."""

    @property
    def __name__(self) -> str:
        return self[0].__name__


def _put(mapping: Any, key: type, value: Any) -> None:
    mapping.register(key, value, exist_ok=True)


def _backends(processor: type) -> dict[str, type]:
    """Name one class for both backends, of which transformers takes the torchvision one first."""
    return {"torchvision": processor, "pil": processor}


class _StandIn(type):
    """The metaclass of stand-ins, each of which behaves as the class that it stands for."""

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
    """Add to PEFT's table of the layers that `LoraConfig()` adapts when it names none, by `model_type`."""
    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for architecture in architectures().values():
        table |= {model_type: list(architecture.lora) for model_type in architecture.configs}
