"""The output of commands: results on stdout, everything else on stderr, and data never as markup."""

import io
import json
import math
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer

from hfvlm.logs import tracked

# Categories of characters that move the cursor, reverse the direction of text or cannot be encoded.
UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # of scripts and emoji; they move nothing
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


class _State:
    quiet = False


def neutral(text: Any, allowed: str = "\n\t") -> str:
    """Escape every character that a terminal would act on, as `\\x1b`.

    Args:
        text: a file's name, a model's answer, an error.
        allowed: control characters that stay as they are.
    """
    return "".join(
        character
        if character in allowed or character in JOINERS or unicodedata.category(character) not in UNPRINTABLE
        else character.encode("unicode_escape").decode("ascii")
        for character in str(text)
    )


def line(text: Any) -> str:
    """Escape a text to one line."""
    return neutral(text, allowed="")


def print_text(text: Any) -> None:
    """Print a result."""
    typer.echo(neutral(text))


def print_piece(text: str) -> None:
    """Print a part of a result that is still being generated."""
    typer.echo(neutral(text), nl=False)


def note(text: Any, *, err: bool = True) -> None:
    """Print a note on progress, unless --quiet."""
    if not _State.quiet:
        typer.echo(neutral(text), err=err)


def print_error(text: Any) -> None:
    """Print an error."""
    typer.echo(f"error: {neutral(text)}", err=True)


def print_json(content: Any) -> None:
    """Print a result for programs; NaN and infinity, which JSON lacks, are null."""
    typer.echo(json.dumps(finite(content), indent=2, default=str))


def finite(content: Any) -> Any:
    """Replace the numbers that JSON lacks by None."""
    if isinstance(content, dict):
        return {str(name): finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def print_table(rows: Iterable[Sequence[Any]], heads: Sequence[str] = ()) -> None:
    """Print aligned columns, a line for each row whatever the terminal's width: names stay whole, for grep.

    Args:
        rows: a text for each column.
        heads: of the columns.
    """
    table = [[line(cell) for cell in row] for row in ([heads] if heads else []) + [list(row) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show a spinner with a text, on a terminal."""
    if _State.quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(line(text))):
        yield


def progress(items: Sequence[Any], text: str) -> Iterable[Any]:
    """Yield the items, with a bar on a terminal."""
    return items if _State.quiet or not sys.stderr.isatty() else tracked(items, line(text), len(items))


@contextmanager
def logs_to_stderr() -> Iterator[None]:
    """Redirect what libraries print to stdout, which is for results, to stderr; drop it in quiet commands."""
    with redirect_stdout(io.StringIO() if _State.quiet else sys.stderr):
        yield


def is_quiet() -> bool:
    """Check whether notes and bars are left out."""
    return _State.quiet


def begin(*, quiet: bool) -> None:
    """Set the verbosity of this command, before anything is imported that reads the environment."""
    _State.quiet = quiet
    if quiet:
        os.environ.update(QUIET)
