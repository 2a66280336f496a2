"""Numbers from users, checked where they come in."""

from collections.abc import Mapping
from math import isfinite
from numbers import Integral, Real
from typing import Any

from hfvlm.checks.messages import shown

# Of numbers by name: whether whole, the lowest, the highest, and whether the lowest is allowed.
Ranges = Mapping[str, tuple[bool, float, float | None, bool]]
# The options of `generate`.
GENERATION: Ranges = {
    "max_new_tokens": (True, 1, None, True),
    "min_new_tokens": (True, 0, None, True),
    "max_length": (True, 1, None, True),
    "min_length": (True, 0, None, True),
    "num_beams": (True, 1, None, True),
    "num_return_sequences": (True, 1, None, True),
    "no_repeat_ngram_size": (True, 0, None, True),
    "top_k": (True, 0, None, True),
    "top_p": (False, 0, 1, False),
    "min_p": (False, 0, 1, True),
    "typical_p": (False, 0, 1, False),
    "temperature": (False, 0, None, False),
    "repetition_penalty": (False, 0, None, False),
    "length_penalty": (False, -1e4, 1e4, True),
    "max_time": (False, 0, None, False),
}


def check_integer(name: str, value: Any, low: int | None = 1, high: int | None = None) -> int:
    """Return an argument that is an integer within its range.

    Args:
        name: of the argument, for the error.
        value: a boolean, a float or a text is none.
        low: the lowest allowed; None for no bound.
        high: the highest allowed; None for no bound.

    Raises:
        ValueError: it is no integer, or out of range; the message names the argument and its range.
    """
    wanted = "an integer" + bounds(low, high)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be {wanted}, not {shown(value)}.")
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{name} must be {wanted}, not {value}.")
    return number


def check_number(
    name: str, value: Any, low: float | None = None, high: float | None = None, *, open_low: bool = False
) -> float:
    """Return an argument that is a finite number within its range.

    Args:
        name: of the argument, for the error.
        value: a boolean or a text is none.
        low: the lowest allowed; None for no bound.
        high: the highest allowed; None for no bound.
        open_low: the lowest itself is refused.

    Raises:
        ValueError: it is no finite number, or out of range; the message names the argument and its range.
    """
    wanted = "a finite number" + bounds(low, high, open_low=open_low)
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value):
        raise ValueError(f"{name} must be {wanted}, not {shown(value)}.")
    number = float(value)
    below = low is not None and (number <= low if open_low else number < low)
    if below or (high is not None and number > high):
        raise ValueError(f"{name} must be {wanted}, not {value}.")
    return number


def check_generation(options: Mapping[str, Any]) -> None:
    """Refuse numbers out of range among the options of `generate`; None leaves an option to the model.

    Raises:
        ValueError: the message names the option and its range.
    """
    check_ranges(options, GENERATION)


def check_ranges(values: Mapping[str, Any], ranges: Ranges) -> None:
    """Refuse numbers out of range; None is allowed.

    Raises:
        ValueError: the message names the number and its range.
    """
    for name, (whole, low, high, closed) in ranges.items():
        value = values.get(name)
        if value is None:
            continue
        if whole:
            check_integer(name, value, int(low), None if high is None else int(high))
        else:
            check_number(name, value, low, high, open_low=not closed)


def bounds(low: float | None, high: float | None, *, open_low: bool = False) -> str:
    """Describe a range, to follow the kind of a number."""
    if low is not None and high is not None:
        return f" {'above' if open_low else 'from'} {low:g} to {high:g}"
    if low is not None:
        return f" above {low:g}" if open_low else f" of at least {low:g}"
    return "" if high is None else f" of at most {high:g}"
