"""Settings, declared once: a class attribute whose annotation carries the check of its values.

`num_frames: Annotated[int, whole(1, 2**16)] = 8` is a setting, its default and its check: files save it, constructors
and calls take it by name, and an error names it. Keywords that no one knows are refused: nothing is swallowed.
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from typing import Annotated, Any, TypeAlias, get_origin

import numpy as np
import torch
from transformers.utils.hub import DownloadKwargs

from hfvlm.checks.files import NamedErrors
from hfvlm.checks.keywords import check_keywords

# Returns a value in its saved form, or raises a ValueError with what it must be.
Check: TypeAlias = Callable[[Any], Any]

# Fields that transformers stores with a processor or a tokenizer, or passes to every part of one.
STORED = frozenset(
    {
        "_auto_class",
        "_processor_class",
        "auto_map",
        "backend",
        "feature_extractor_type",
        "image_processor_type",
        "is_fast",
        "name_or_path",
        "processor_class",
        "use_fast",
        "video_processor_type",
    }
)
# How a folder is found and read; `from_pretrained` and the pipelines pass these to every part. transformers declares
# only the first group, and takes the others out of `**kwargs`.
LOADING = frozenset(
    {
        *DownloadKwargs.__annotations__,
        "_commit_hash",
        "_from_auto",
        "_from_pipeline",
        "attn_implementation",
        "code_revision",
        "device_map",
        "dtype",
        "experts_implementation",
        "is_local",
        "low_cpu_mem_usage",
        "max_memory",
        "mirror",
        "offload_folder",
        "quantization_config",
        "resume_download",
        "torch_dtype",
        "trust_remote_code",
        "use_auth_token",
        "use_safetensors",
        "user_agent",
        "variant",
    }
)
# Keywords of `from_pretrained` of a whole processor: each part takes its own, the whole checks that all were taken.
_shared: ContextVar[frozenset[str]] = ContextVar("shared_keywords", default=frozenset())


@contextmanager
def sharing(names: Iterable[str]) -> Any:
    """Load a whole processor: keywords that its other parts may know are no error of one part."""
    token = _shared.set(frozenset(names))
    try:
        yield
    finally:
        _shared.reset(token)


def shared() -> frozenset[str]:
    """Return the keywords of the whole processor that is being loaded; see `sharing`."""
    return _shared.get()


# Checks of values


def check_value(owner: Any, name: str, value: Any, check: Check) -> Any:
    """Return a value in its saved form.

    Raises:
        ValueError: naming the owner's class, the setting and what it must be.
    """
    try:
        return check(value)
    except ValueError as error:
        raise ValueError(f"{type(owner).__name__}: {name} {error}, not {value!r:.200}.") from error


def flag(value: Any) -> bool:
    """Check a boolean."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError("must be True or False")
    return bool(value)


def whole(least: int = 1, most: int = 2**31 - 1) -> Check:
    """Make the check of an integer of a range."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
            raise ValueError(f"must be an integer of {least} to {most}")
        return int(value)

    return check


def number(*, above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> Check:
    """Make the check of a finite number of a range."""

    def check(value: Any) -> float:
        known = isinstance(value, Real) and not isinstance(value, bool)
        if not known or not math.isfinite(value) or not (value > above and least <= value <= most):
            bounds = [f"above {above:g}"] * (above > -math.inf) + [f"of {least:g} or more"] * (least > -math.inf)
            bounds += [f"of {most:g} or less"] * (most < math.inf)
            raise ValueError(" ".join(["must be a finite number", " and ".join(bounds)]).rstrip())
        return value if isinstance(value, int | float) else float(value)

    return check


def factor(value: Any) -> float:
    """Check a finite number that is not zero."""
    try:
        if checked := number()(value):
            return checked
    except ValueError:
        pass
    raise ValueError("must be a finite number other than 0")


def channels(*, above: float = -math.inf) -> Check:
    """Make the check of a number for each of three channels; one number stands for three."""
    each = number(above=above)

    def check(value: Any) -> list[float]:
        values = value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value
        values = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values] * 3
        try:
            if len(values) == 3:
                return [each(item) for item in values]
        except ValueError:
            pass
        raise ValueError(f"must be three finite numbers{f' above {above:g}' if above > -math.inf else ''}")

    return check


def one_of(*values: Any) -> Check:
    """Make the check of one of a few values."""

    def check(value: Any) -> Any:
        if value not in values or isinstance(value, bool):
            raise ValueError(f"must be one of {', '.join(map(str, values))}")
        return value

    return check


def string(value: Any) -> str:
    """Check a string."""
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


def or_none(check: Check) -> Check:
    """Make a check that also takes None."""
    return lambda value: None if value is None else check(value)


def resample(value: Any) -> int:
    """Check one of Pillow's filters."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) <= 5:
        raise ValueError(
            "must be one of Pillow's filters: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming"
        )
    return int(value)


def color(value: Any) -> int | list[int]:
    """Check a colour: one value, or one of each band."""
    level = whole(0, 65535)
    try:
        return [level(item) for item in value] if isinstance(value, list | tuple) and value else level(value)
    except ValueError as error:
        raise ValueError("must be an integer of 0 or more, or a list of one for each band") from error


# The longest edge that an image is resized to.
MAX_EDGE = 2**14
edge = whole(1, MAX_EDGE)


def rectangle(value: Any) -> dict[str, int]:
    """Check a size: `{"height", "width"}` in pixels; one integer is a square, as `{"shortest_edge": n}` is."""
    if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
        value = value["shortest_edge"]
    try:
        if isinstance(value, Mapping) and set(value) == {"height", "width"}:
            return {"height": edge(value["height"]), "width": edge(value["width"])}
        if not isinstance(value, Mapping):
            return {"height": edge(value), "width": edge(value)}
    except ValueError:
        pass
    raise ValueError(f"must be an integer or {{'height': ..., 'width': ...}} of 1 to {MAX_EDGE} pixels")


def square(value: Any) -> dict[str, int]:
    """Check the size of a square."""
    try:
        size = rectangle(value)
        if size["height"] == size["width"]:
            return size
    except ValueError:
        pass
    raise ValueError(f"must be one edge, or {{'height': n, 'width': n}} of a square, of 1 to {MAX_EDGE} pixels")


# Settings that several classes have.
Flag: TypeAlias = Annotated[bool, flag]
Number: TypeAlias = Annotated[float, number()]
Positive: TypeAlias = Annotated[float, number(above=0)]
Factor: TypeAlias = Annotated[float, factor]
Means: TypeAlias = Annotated[list[float], channels()]
Deviations: TypeAlias = Annotated[list[float], channels(above=0)]
Filter: TypeAlias = Annotated[int, resample]
Edge: TypeAlias = Annotated[int, edge]
Size: TypeAlias = Annotated[dict[str, int], rectangle]
Frames: TypeAlias = Annotated[int, whole(1, 2**16)]
Clips: TypeAlias = Annotated[int, whole(1, 2**12)]
Seconds: TypeAlias = Annotated[float, number(above=0, most=86_400)]
Hertz: TypeAlias = Annotated[int, whole(1, 1_000_000)]
Bins: TypeAlias = Annotated[int, whole(1, 2**12)]


class Checked(NamedErrors):
    """Base of classes whose settings are annotated with their checks; a subclass may annotate one again."""

    SETTINGS: Mapping[str, Check] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        declared = [inspect.get_annotations(base) for base in reversed(cls.__mro__) if issubclass(base, Checked)]
        hints = {name: hint for own in declared for name, hint in own.items() if get_origin(hint) is Annotated}
        cls.SETTINGS = {name: hint.__metadata__[0] for name, hint in hints.items()}

    def checked_value(self, name: str, value: Any) -> Any:
        """Return the value of a setting in its saved form, and that of any other name as it is.

        Raises:
            ValueError: naming the setting and what it must be.
        """
        return check_value(self, name, value, self.SETTINGS[name]) if name in self.SETTINGS else value


class Settings(Checked):
    """Settings with defaults as class attributes, that a file saves and a call may override."""

    # Keywords of transformers that mean nothing here, or are read from the call only.
    STANDING: frozenset[str] = frozenset()

    def take_settings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Set the settings of a constructor, and return what transformers stores next to them.

        Raises:
            TypeError: an unknown setting.
            ValueError: a value that the setting cannot have.
        """
        check_keywords(self, kwargs, self.SETTINGS, {*self.STANDING, *STORED, *LOADING, *shared()})
        for name, value in self.checked(self.settled(kwargs, type(self))).items():
            setattr(self, name, value)
        return {name: value for name, value in kwargs.items() if name in STORED}

    def settings_for(self, kwargs: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
        """Return the settings of one call.

        Raises:
            TypeError: an unknown setting.
            ValueError: a value that the setting cannot have.
        """
        check_keywords(self, kwargs, self.SETTINGS, ignored)
        return self.checked(self.settled(kwargs, self))

    def settled(self, given: Mapping[str, Any], defaults: Any) -> dict[str, Any]:
        """Return every setting: as it is given, or else the default's; None stands for the default."""
        return {name: getattr(defaults, name) if given.get(name) is None else given[name] for name in self.SETTINGS}

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return settings in their saved form.

        Raises:
            ValueError: naming the setting and what it must be.
        """
        return {name: self.checked_value(name, value) for name, value in settings.items()}

    def call_keywords(self) -> frozenset[str]:
        """Return the names of the keywords that a call knows."""
        return frozenset({*self.SETTINGS, *self.STANDING, "allow_urls", "return_tensors"})

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an instance from the content of a file; keywords that are settings override it.

        Raises:
            TypeError: an unknown setting, in the file or among the keywords.
            ValueError: the file holds no table of settings, or a value that the setting cannot have.
        """
        (fields,) = args
        if not isinstance(fields, Mapping):
            raise ValueError(f"{cls.__name__}: its settings are no JSON object but {fields!r:.100}.")
        returned = kwargs.pop("return_unused_kwargs", False)
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.SETTINGS}
        if not returned:
            check_keywords(cls, kwargs, cls.SETTINGS, {*cls.STANDING, *STORED, *LOADING, *shared()})
        made = cls(**{**fields, **own})
        return (made, kwargs) if returned else made
