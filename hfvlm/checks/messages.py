"""Foreign text in messages: short, and without control characters, which terminals obey."""

from collections.abc import Iterable
from typing import Any

LONGEST_NAME = 100
LONGEST_MESSAGE = 2000


def printable(text: str) -> str:
    """Escape every character of a text that is not printable, as terminals obey some of them."""
    if text.isprintable():
        return text
    return "".join(
        char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def cut(text: str, most: int = LONGEST_MESSAGE) -> str:
    """Cut the middle out of a text longer than `most`, and make it printable."""
    if len(text) > most:
        text = f"{text[: most * 2 // 3]}...[{len(text)} characters]...{text[-(most // 3) :]}"
    return printable(text)


def shown(value: Any, most: int = LONGEST_NAME) -> str:
    """Show a foreign value in quotes, as `repr` does, cut to about `most` characters."""
    if isinstance(value, str | bytes):
        text = repr(value[: most + 1])
        return cut(text if len(value) <= most else f"{text[:most]}...", 2 * most)
    if isinstance(value, bool | int | float | None):
        return str(value) if not isinstance(value, int) or value.bit_length() < 2**10 else "a huge number"
    if isinstance(value, list | tuple | set | dict):
        return f"a {type(value).__name__} of {len(value)}" if len(value) > 8 else _short(value, most)
    return f"a {type(value).__name__}"


def _short(value: Any, most: int) -> str:
    if any(isinstance(item, list | tuple | set | dict) for item in value):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        return cut("{" + ", ".join(f"{shown(k, 40)}: {shown(v, 40)}" for k, v in value.items()) + "}", 2 * most)
    left, right = "[]" if isinstance(value, list) else "()"
    return cut(left + ", ".join(shown(item, 40) for item in value) + right, 2 * most)


def listed(names: Iterable[Any], most: int = 6) -> str:
    """List the first `most` names, and the number of the others."""
    names = list(names)
    text = ", ".join(cut(str(name), LONGEST_NAME) for name in names[:most])
    return text + (f", and {len(names) - most} more" if len(names) > most else "")
