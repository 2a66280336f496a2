"""`hfvlm convert|export|merge|verify|card|push`: folders of one model."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hfvlm.cli.catalogue import known_presets, licence_text
from hfvlm.cli.console import note, print_json, print_table, print_text, status
from hfvlm.cli.options import Folder, Json, Output, Overwrite, Quiet, checked_dtype, pairs
from hfvlm.cli.outputs import check_card, check_output
from hfvlm.presets import Preset, load_preset
from hfvlm.registry import architectures


def convert(  # noqa: PLR0913 (options)
    source: Annotated[Path, typer.Argument(help="The released file, or the folder that holds it.")],
    preset: Annotated[
        str,
        typer.Option(
            help="A preset's name; or an architecture's, for other checkpoints of it.", autocompletion=known_presets
        ),
    ],
    output: Output,
    base: Annotated[
        Path | None, typer.Option(help="The language model that an adapter, a projector or a delta belongs to.")
    ] = None,
    delta: Annotated[Path | None, typer.Option(help="A delta to the base, where a release builds on it.")] = None,
    vision: Annotated[Path | None, typer.Option(help="The vision tower, where the release leaves it out.")] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Any other part, as `info` names it; may be repeated."),
    ] = None,
    vocabulary: Annotated[
        str | None, typer.Option(help="The tokenizer's original file; 'none' leaves the tokenizer out.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by default as released.")] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Write weights that are NaN or infinite, too.")
    ] = False,
    check: Annotated[bool, typer.Option("--verify", help="Run `hfvlm verify` on the result.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Convert an authors' checkpoint to a transformers folder."""
    from hfvlm.release.converter import convert as run

    known = Preset(name=preset, architecture=preset) if preset in architectures() else load_preset(preset)
    if dtype is not None:
        checked_dtype(dtype)
    check_output(output, overwrite=overwrite)
    note(f"Licence of {known.name}:\n" + "".join(f"  {text}\n" for text in licence_text(known).splitlines()))
    given = {"base": base, "delta": delta, "vision": vision}
    parts = {name: str(path) for name, path in given.items() if path} | named_paths(part)
    with status(f"converting {source}"):
        options: dict[str, Any] = {"dtype": dtype, "allow_nonfinite": allow_nonfinite, "overwrite": overwrite}
        run(source, preset, output, parts=parts, vocabulary=vocabulary, **options)
    record = json.loads((output / "conversion.json").read_text(encoding="utf-8"))
    note(f"{output}: all {record['keys']['read']} tensors of {record['source']['name']} accounted for", err=False)
    if check:
        verify(output)


def named_paths(given: list[str] | None) -> dict[str, str]:
    """Read options like "audio=LanguageBind_Audio_FT"."""
    if wrong := [text for text in given or () if not text.partition("=")[2]]:
        raise ValueError(f"--part takes NAME=PATH, not {', '.join(wrong)}.")
    return pairs(given, "--part", "NAME=PATH")


def export(
    folder: Folder,
    output: Output,
    to: Annotated[str, typer.Option(help="What shall load it: transformers, or onnx.")] = "transformers",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write a folder that transformers' own classes load, or ONNX graphs of a model's towers."""
    from hfvlm.release.export import export as run
    from hfvlm.release.merging import whole

    check_output(output, overwrite=overwrite)
    with status(f"exporting {folder}"), whole(folder) as model:
        run(model, output, to=to, overwrite=overwrite)
    reader = "ONNX" if to == "onnx" else "transformers' own classes"
    note(f"{output}: for {reader}", err=False)


def merge(
    adapter: Annotated[
        Path, typer.Argument(help="A folder of an adapter, as `hfvlm train` writes it.", exists=True, file_okay=False)
    ],
    output: Output,
    base: Annotated[
        str | None, typer.Option(help="The model that the adapter belongs to, if it lies elsewhere now.")
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter and its base as one model, with its processor and card."""
    from hfvlm.release.merging import merge as run

    check_output(output, overwrite=overwrite)
    with status(f"merging {adapter}"):
        run(adapter, output, base=base, overwrite=overwrite)
    note(f"{output}: the base with its adapter", err=False)


def verify(
    folder: Folder,
    examples: Annotated[
        Path | None, typer.Option(help="The folder of the media whose results the authors' README prints.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that a folder holds what was converted, and is whole and consistent."""
    from hfvlm.release.verification import verify as run

    with status(f"verifying {folder}"):
        checks = run(folder, **({"examples": examples} if examples else {}))
    passed = all(check.passed is not False for check in checks)
    if as_json:
        print_json({"folder": str(folder), "passed": passed, "checks": [asdict(check) for check in checks]})
    else:
        print_table([(check.name, verdict(check), check.detail) for check in checks])
    if not passed:
        raise typer.Exit(1)


def verdict(check: Any) -> str:
    """Return yes, NO, or the check's own verdict on what it could not test."""
    return getattr(check, "verdict", None) or ("yes" if check.passed else "NO")


def card(
    folder: Folder,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a README.md that hfvlm did not write.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write the folder's model card (README.md) again."""
    from hfvlm.release.hub import write_card

    check_card(folder, overwrite=overwrite)
    note(write_card(folder), err=False)


def push(
    folder: Folder,
    repository: Annotated[str, typer.Argument(help="user/name on the Hub.")],
    licence_read: Annotated[
        bool, typer.Option("--i-have-read-the-licence", help="For non-commercial, special and unknown licences.")
    ] = False,
    stub: Annotated[bool, typer.Option(help="Add the auto_map stub for trust_remote_code=True.")] = False,
    private: Annotated[bool | None, typer.Option(help="Visibility of a new repository.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be uploaded, and upload nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a folder with its card to the Hub."""
    from hfvlm.release.hub import push as run

    options: dict[str, Any] = {"dry_run": True} if dry_run else {}
    done: Any = run(folder, repository, accept_licence=licence_read, stub=stub, private=private, **options)
    if not as_json:
        print_text(done)
    elif dry_run:
        print_json({"dry_run": True} | asdict(done))
    else:
        print_json({"dry_run": False, "repo_id": repository, "commit": str(done)})
