"""The `hfvlm` command."""

import sys

from hfvlm.cli.commands import app
from hfvlm.cli.console import stderr

__all__ = ["main"]


def main() -> None:
    """Run a command; an error that the library raises with a remedy is printed without its traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        stderr.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
