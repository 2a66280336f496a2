"""Options that several commands have, and the checks of their values."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hfvlm.cli.console import begin, line

DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")


def _quiet(value: bool) -> bool:  # noqa: FBT001 (typer's callback)
    if value:
        begin(quiet=True)
    return value


def finite_number(value: float | None) -> float | None:
    """Check the number of an option, as its callback.

    Raises:
        typer.BadParameter: it is `nan` or `inf`.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


Folder = Annotated[
    Path,
    typer.Argument(
        help="A folder that convert, save_pretrained or train wrote.", exists=True, file_okay=False, readable=True
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The new folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that hfvlm wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Print results and errors only.", callback=_quiet, expose_value=False, is_eager=True
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="NAME=COLUMN", help="As image=photo or text=caption; may be repeated."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most this many rows.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="MODALITY.NAME=VALUE",
        help="A setting of the processor, as audio.sampling_rate=16000 or depth.encoding=disparity; may be repeated.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows that the model takes at a time.")]


def pairs(given: Sequence[str] | None, option: str, form: str = "NAME=COLUMN") -> dict[str, str]:
    """Read options written as name=value.

    Raises:
        typer.BadParameter: one is not, or a name is given twice.
    """
    found: dict[str, str] = {}
    for text in given or ():
        name, _, value = text.partition("=")
        if not name or not value:
            raise typer.BadParameter(f"{line(text)!r}: write {form}.", param_hint=option)
        if name in found:
            raise typer.BadParameter(f"{line(name)} is given twice.", param_hint=option)
        found[name] = value
    return found


def processor_options(given: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Read options written as audio.sampling_rate=16000: by modality, for `Embedder.encode`."""
    import yaml

    found: dict[str, dict[str, Any]] = {}
    for name, value in pairs(given, "--option", "MODALITY.NAME=VALUE").items():
        modality, _, option = name.partition(".")
        if not modality or not option:
            raise typer.BadParameter(f"{line(name)!r}: write MODALITY.NAME=VALUE.", param_hint="--option")
        found.setdefault(modality, {})[option] = yaml.safe_load(value)
    return found


def checked_device(name: str) -> str:
    """Check that this machine has a device.

    Raises:
        typer.BadParameter: it has not; the message lists those it has.
    """
    import torch

    if name == "auto":
        return name
    known = ["cpu"]
    if (accelerator := torch.accelerator.current_accelerator()) is not None:
        count = torch.accelerator.device_count()
        known += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(count))]
    if name not in known:
        raise typer.BadParameter(f"{line(name)!r}: this machine has {', '.join(known)}.", param_hint="--device")
    return name


def checked_dtype(name: str) -> str:
    """Check that a precision is a floating type, or auto.

    Raises:
        typer.BadParameter: it is none.
    """
    return chosen(name, DTYPES, "--dtype")


def chosen(value: str, known: Iterable[str], option: str) -> str:
    """Check that a value is among the known ones.

    Raises:
        typer.BadParameter: it is not; the message lists them.
    """
    if value not in (names := list(known)):
        raise typer.BadParameter(f"{line(value)!r} is none of {', '.join(names)}.", param_hint=option)
    return value
