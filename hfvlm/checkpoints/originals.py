"""An original's own configuration, and the layers that the names of its tensors count."""

from collections.abc import Iterable, Mapping
from typing import Any


class UnsupportedOriginalError(ValueError):
    """An original configuration with an option that hfvlm's architecture does not have."""


def original_config(original: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the constructor's arguments, out of whatever records them: a golden case, or open_clip's own file."""
    for wrapper in ("constructor", "model_cfg"):
        original = original.get(wrapper, original)
    return original


def check_options(where: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse what would be ignored.

    Raises:
        UnsupportedOriginalError: an option is set that `known` does not name.
    """
    unknown = sorted(name for name, value in options.items() if value and name not in set(known))
    if unknown:
        raise UnsupportedOriginalError(f"{where}: hfvlm does not implement {', '.join(unknown)}.")


def count_layers(keys: Iterable[str], prefix: str) -> int:
    """Count the layers numbered from zero under `prefix`, which ends before the number."""
    return len({key.removeprefix(prefix).partition(".")[0] for key in keys if key.startswith(prefix)})
