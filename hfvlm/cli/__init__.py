"""The `hfvlm` command."""

import os
import sys
from types import ModuleType
from typing import Any, NoReturn

import typer

from hfvlm.cli.commands import app
from hfvlm.cli.console import is_quiet, neutral, print_error
from hfvlm.registry import after_import

__all__ = ["main"]

UsageError: Any = typer.BadParameter.__base__
ENDED_BY_CTRL_C = 130


def main() -> NoReturn:
    """Run a command; an error that the library raises with a remedy is printed without its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal's encoding may lack characters of names
            stream.reconfigure(errors="backslashreplace")
    after_import("transformers.utils.logging", _without_weight_bars)
    try:
        code = app(standalone_mode=False) or 0
    except UsageError as error:
        code = _wrong_usage(error)
    except typer.Abort:
        code = ENDED_BY_CTRL_C
    except BrokenPipeError:  # `hfvlm list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (ValueError, OSError, ImportError) as error:
        print_error(error)
        code = 1
    sys.exit(code)


def _wrong_usage(error: Any) -> int:
    if error.ctx is not None:
        typer.echo(neutral(f"{error.ctx.get_usage()}\n"), err=True)
    print_error(error.format_message())
    return error.exit_code


def _without_weight_bars(logging: ModuleType) -> None:
    """Leave out transformers' bars of loaded weights, and keep the Hub's of downloads."""
    from huggingface_hub import utils

    shown = not utils.are_progress_bars_disabled()
    logging.disable_progress_bar()
    if shown and not is_quiet():
        utils.enable_progress_bars()
