"""What the converter knows of an architecture: every module of `hfvlm.conversion` ends with a `Conversion`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.key_table import Row, Table

# A tokenizer's file, by the names that it may have.
Names = tuple[str, ...]


def always(value: Any) -> Callable[..., Any]:
    """Make a function of anything whose result is `value`."""
    return lambda *_: value


def head_of(config: Any, default: str) -> str:
    """Return the class of the model that a configuration is for."""
    return (config.architectures or [default])[0]


@dataclass(frozen=True)
class Source:
    """One of the files that a model is made of, and the settings that lie beside it."""

    path: Path
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]


def part_of(sources: Mapping[str, Source], name: str, parts: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Return the tensors of a part.

    Raises:
        FileNotFoundError: it was not given; the message names where it comes from.
    """
    if name not in sources:
        raise FileNotFoundError(
            f"This release needs its {name} (--{name}, or parts={{{name!r}: ...}}): {parts[name]}."
        )
    return sources[name].tensors


@dataclass(frozen=True, kw_only=True)
class Export:
    """The way to transformers' own classes, of an architecture that it has as well.

    Args:
        config: our configuration -> transformers' of the same model.
        processor: our processor -> transformers' of the same vocabulary and pixels.
        tensors: the tensors in transformers' layout and its configuration -> what its classes load.
    """

    config: Callable[[Any], Any]
    processor: Callable[[Any], Any]
    tensors: Callable[[Mapping[str, Tensor], Any], Mapping[str, Tensor]] = lambda tensors, _: tensors


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How the original checkpoints of an architecture are read.

    Args:
        config_from_original: the original's own configuration in its own names, and the tensors, for what that leaves
            open -> our configuration.
        keys_for: configuration, layout and keys -> the rows for a released file of that layout.
        layout_of: the original's own configuration -> the layout of its files.
        settings_from_original: it and what lies beside it for preprocessing -> the processor's settings.
        image_processor_for: configuration and settings -> the image processor alone.
        processor_for: configuration, settings and the files of `vocabularies_for` -> the processor.
        vocabularies_for: configuration -> the names of each file that the tokenizers are made of; none where the model
            reads no texts.
        parts: the further files that a model is made of, by their role, each with what it is.
        files: names of a release's files by their role, by the layouts that have more than one file.
        compose: configuration, layout and sources -> a table for each, where a model is made of several files.
        fresh_parameters: configuration, layout, keys of the file and of the model -> the parameters that start from
            their initialisation, since a file need not have them.
        export: the way to transformers' own classes.
    """

    config_from_original: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Any]
    keys_for: Callable[..., list[Row]]
    layout_of: Callable[[Mapping[str, Any]], str]
    image_processor_for: Callable[[Any, Mapping[str, Any]], Any]
    processor_for: Callable[..., Any]
    vocabularies_for: Callable[[Any], Sequence[Names]]
    settings_from_original: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] = lambda *_: {}
    parts: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Names]] = field(default_factory=dict)
    compose: Callable[[Any, str, Mapping[str, Source]], list[Table]] | None = None
    fresh_parameters: Callable[..., list[str]] = lambda *_: []
    export: Export | None = None

    def tables_for(self, config: Any, layout: str, sources: Mapping[str, Source]) -> list[Table]:
        """Return one table for each source."""
        if self.compose is not None:
            return self.compose(config, layout, sources)
        tensors = sources["main"].tensors
        return [Table(tensors, self.keys_for(config, layout, tensors))]
