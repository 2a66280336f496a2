"""Keywords that are known by name, and settings whose values are checked: nothing that a caller says is swallowed."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
import torch

from hfvlm.checks.files import NamedErrors
from hfvlm.checks.keywords import check_keywords

# A value in its saved form, or a ValueError that says what it must be.
Check: TypeAlias = Callable[[Any], Any]

# What transformers stores with a processor or a tokenizer, or hands to every part of one.
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
# How a folder is found and read; `from_pretrained` and the pipelines hand these to every part.
LOADING = frozenset(
    {
        "_commit_hash",
        "_from_auto",
        "_from_pipeline",
        "attn_implementation",
        "cache_dir",
        "code_revision",
        "device_map",
        "dtype",
        "experts_implementation",
        "force_download",
        "is_local",
        "local_files_only",
        "low_cpu_mem_usage",
        "max_memory",
        "mirror",
        "offload_folder",
        "proxies",
        "quantization_config",
        "resume_download",
        "revision",
        "subfolder",
        "token",
        "torch_dtype",
        "trust_remote_code",
        "use_auth_token",
        "use_safetensors",
        "user_agent",
        "variant",
    }
)
# What `from_pretrained` of a whole processor was given: each part takes its own, the whole checks that all was taken.
_shared: ContextVar[frozenset[str]] = ContextVar("shared_keywords", default=frozenset())


@contextmanager
def sharing(names: Iterable[str]) -> Any:
    """While a whole processor is loaded: keywords that its other parts may know are no error of this one."""
    token = _shared.set(frozenset(names))
    try:
        yield
    finally:
        _shared.reset(token)


def shared() -> frozenset[str]:
    """Keywords of the whole processor that is being loaded; see `sharing`."""
    return _shared.get()


# Checks of values


def flag(value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError("must be True or False")
    return bool(value)


def whole(least: int = 1, most: int = 2**31 - 1) -> Check:
    """An integer of a range."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
            raise ValueError(f"must be an integer of {least} to {most}")
        return int(value)

    return check


def number(*, above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> Check:
    """A finite number of a range."""

    def check(value: Any) -> float:
        known = isinstance(value, Real) and not isinstance(value, bool)
        if not known or not math.isfinite(value) or not (value > above and least <= value <= most):
            bounds = [f"above {above:g}"] * (above > -math.inf) + [f"of {least:g} or more"] * (least > -math.inf)
            bounds += [f"of {most:g} or less"] * (most < math.inf)
            raise ValueError(" ".join(["must be a finite number", " and ".join(bounds)]).rstrip())
        return value if isinstance(value, int | float) else float(value)

    return check


def channels(*, above: float = -math.inf) -> Check:
    """A number for each of three channels; one number stands for three."""
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
    """One of a few values."""

    def check(value: Any) -> Any:
        if value not in values or isinstance(value, bool):
            raise ValueError(f"must be one of {', '.join(map(str, values))}")
        return value

    return check


def string(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


def or_none(check: Check) -> Check:
    """The same, or None."""
    return lambda value: None if value is None else check(value)


def resample(value: Any) -> int:
    """One of Pillow's filters."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) <= 5:
        raise ValueError(
            "must be one of Pillow's filters: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming"
        )
    return int(value)


def color(value: Any) -> int | list[int]:
    """One value, or one of each band."""
    level = whole(0, 65535)
    try:
        return [level(item) for item in value] if isinstance(value, list | tuple) and value else level(value)
    except ValueError as error:
        raise ValueError("must be an integer of 0 or more, or a list of one for each band") from error


# The longest edge that an image is resized to.
MAX_EDGE = 2**14
edge = whole(1, MAX_EDGE)


def rectangle(value: Any) -> dict[str, int]:
    """`{"height", "width"}` in pixels; one integer means a square, as `{"shortest_edge": n}` does."""
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
    """The same, of one edge."""
    try:
        size = rectangle(value)
        if size["height"] == size["width"]:
            return size
    except ValueError:
        pass
    raise ValueError(f"must be one edge, or {{'height': n, 'width': n}} of a square, of 1 to {MAX_EDGE} pixels")


# What every processor calls by the same name; a class adds its own in `CHECKS`.
CHECKS: dict[str, Check] = {
    "antialias": flag,
    "baseline": number(above=0),
    "clip_seconds": number(above=0, most=86_400),
    "do_normalize": flag,
    "do_rescale": flag,
    "do_resize": flag,
    "do_sample_frames": flag,
    "farthest": number(above=0),
    "fill_color": color,
    "focal_length": number(above=0),
    "image_mean": channels(),
    "image_std": channels(above=0),
    "max_num_patches": whole(1, 2**20),
    "mean": number(),
    "nearest": number(above=0),
    "num_clips": whole(1, 2**12),
    "num_frames": whole(1, 2**16),
    "num_mel_bins": whole(1, 2**12),
    "num_samples": whole(1, 2**24),
    "patch_size": whole(1, 2**10),
    "resample": resample,
    "rescale_factor": number(above=0),
    "resized": edge,
    "sampling_rate": whole(1, 1_000_000),
    "size": edge,
    "std": number(above=0),
    "upright": flag,
}


# What transformers calls the argument of an image processor's and of a feature extractor's `from_dict`.
FIELDS = ("image_processor_dict", "feature_extractor_dict")


class Settings(NamedErrors):
    """Named settings with defaults as class attributes, that a file saves and a call may override.

    A subclass lists them in `SETTINGS`; what their values may be is in `CHECKS`, its own or this module's.
    """

    SETTINGS: tuple[str, ...] = ()
    CHECKS: Mapping[str, Check] = {}
    # Keywords of transformers that mean nothing here, or are read from the call alone.
    STANDING: frozenset[str] = frozenset()

    def take_settings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Set what a constructor was given, and return what transformers stores beside it.

        Raises:
            TypeError: an unknown setting.
            ValueError: a value that the setting cannot have.
        """
        check_keywords(self, kwargs, self.SETTINGS, {*self.STANDING, *STORED, *LOADING, *shared()})
        for name, value in self.checked(self.settled(kwargs, type(self))).items():
            setattr(self, name, value)
        return {name: value for name, value in kwargs.items() if name in STORED}

    def settings_for(self, kwargs: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
        """The settings of one call.

        Raises:
            TypeError: an unknown setting.
            ValueError: a value that the setting cannot have.
        """
        check_keywords(self, kwargs, self.SETTINGS, ignored)
        return self.checked(self.settled(kwargs, self))

    def settled(self, given: Mapping[str, Any], defaults: Any) -> dict[str, Any]:
        """Every setting: as it is given, or else the default's; None stands for the default."""
        return {name: getattr(defaults, name) if given.get(name) is None else given[name] for name in self.SETTINGS}

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings in their saved form.

        Raises:
            ValueError: naming the setting and what it must be.
        """
        return {name: self.checked_value(name, value) for name, value in settings.items()}

    def checked_value(self, name: str, value: Any) -> Any:
        """One of them."""
        try:
            return {**CHECKS, **self.CHECKS}[name](value)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {name} {error}, not {value!r:.200}.") from error

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """An instance from what a file holds; keywords that are settings override it.

        Raises:
            TypeError: an unknown setting, in the file or among the keywords.
            ValueError: the file holds no table of settings, or a value that the setting cannot have.
        """
        fields = args[0] if args else next(kwargs.pop(name) for name in FIELDS if name in kwargs)
        if not isinstance(fields, Mapping):
            raise ValueError(f"{cls.__name__}: its settings are no JSON object but {fields!r:.100}.")
        returned = kwargs.pop("return_unused_kwargs", False)
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.SETTINGS}
        if not returned:
            check_keywords(cls, kwargs, cls.SETTINGS, {*cls.STANDING, *STORED, *LOADING, *shared()})
        made = cls(**{**fields, **own})
        return (made, kwargs) if returned else made
