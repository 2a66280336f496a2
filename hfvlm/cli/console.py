"""Where commands print: results on stdout, everything else on stderr, and data never as markup."""

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

# Categories of characters that move the cursor, turn the writing round or cannot be encoded.
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


def neutral(text: Any, kept: str = "\n\t") -> str:
    """Text with every character that a terminal would act on written out, as `\\x1b`.

    Args:
        text: a file's name, a model's answer, an error.
        kept: control characters that stay as they are.
    """
    return "".join(
        character
        if character in kept or character in JOINERS or unicodedata.category(character) not in UNPRINTABLE
        else character.encode("unicode_escape").decode("ascii")
        for character in str(text)
    )


def line(text: Any) -> str:
    """Text as one line."""
    return neutral(text, kept="")


def say(text: Any) -> None:
    """Print a result."""
    typer.echo(neutral(text))


def say_piece(text: str) -> None:
    """Print a part of a result that is still being generated."""
    typer.echo(neutral(text), nl=False)


def note(text: Any, *, err: bool = True) -> None:
    """Print what happens or has happened, unless --quiet."""
    if not _State.quiet:
        typer.echo(neutral(text), err=err)


def complain(text: Any) -> None:
    """Print an error."""
    typer.echo(f"error: {neutral(text)}", err=True)


def say_json(content: Any) -> None:
    """Print a result for programs; NaN and infinity, which JSON lacks, are null."""
    typer.echo(json.dumps(finite(content), indent=2, default=str))


def finite(content: Any) -> Any:
    """JSON content without the numbers that JSON lacks."""
    if isinstance(content, dict):
        return {str(name): finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def say_table(rows: Iterable[Sequence[Any]], heads: Sequence[str] = ()) -> None:
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
    """Show what is being done, on a terminal."""
    if _State.quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(line(text))):
        yield


def progress(items: Sequence[Any], text: str) -> Iterator[Any]:
    """Yield the items, with a bar on a terminal."""
    if _State.quiet or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, line(text), console=Console(stderr=True))


@contextmanager
def logs_to_stderr() -> Iterator[None]:
    """Send what libraries print to stdout, which is for results, to stderr; nowhere where this command is quiet."""
    with redirect_stdout(io.StringIO() if _State.quiet else sys.stderr):
        yield


def is_quiet() -> bool:
    """Whether notes and bars are left out."""
    return _State.quiet


def begin(*, quiet: bool) -> None:
    """Set how much this command prints; nothing that reads the environment is imported yet."""
    _State.quiet = quiet
    if quiet:
        os.environ.update(QUIET)
