"""`hfvlm` and its commands: `hfvlm --help` lists them.

A command's module is imported with the command line; its libraries, as torch, only when it runs.
"""

from typing import Annotated

import typer

from hfvlm.cli import catalogue, data, datasets, evaluation, folders, models, videos
from hfvlm.cli.console import begin, print_text
from hfvlm.cli.doctor import doctor
from hfvlm.cli.serving import serve
from hfvlm.versions import __version__

# Plain help and errors: a frame around them would break the lines that are to be copied.
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def top(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
) -> None:
    """Vision-language models as transformers-native models."""
    begin(quiet=quiet)
    if show:
        print_text(__version__)
        raise typer.Exit


app.command("list")(catalogue.list_command)
app.command()(catalogue.info)
app.command()(folders.convert)
app.command()(folders.export)
app.command()(folders.merge)
app.command()(folders.verify)
app.command()(models.chat)
app.command()(models.draw)
app.command()(folders.card)
app.command()(folders.push)
app.command()(datasets.embed)
app.command()(datasets.capfilt)
app.command()(datasets.search)
app.command()(serve)
app.command("eval")(evaluation.evaluate)
app.command()(models.train)
app.command()(videos.watch)
app.command()(models.demo)
app.command()(doctor)
app.add_typer(data.app, name="data")
