"""`hfvlm list` and `hfvlm info`: the released checkpoints that can be converted."""

import json
from typing import Annotated, Any

import typer

from hfvlm.cli.console import line, print_json, print_table
from hfvlm.cli.options import Json, Quiet
from hfvlm.presets import Preset, list_presets, load_preset
from hfvlm.registry import architectures


def known_presets(begun: str) -> list[str]:
    """Complete a preset's name."""
    return [name for name in list_presets() if name.startswith(begun)]


def known_architectures(begun: str) -> list[str]:
    """Complete an architecture's name."""
    return [name for name in architectures() if name.startswith(begun)]


def list_command(
    architecture: Annotated[
        str | None, typer.Argument(help="Show only this architecture's.", autocompletion=known_architectures)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the released checkpoints that can be converted."""
    # Swin's files become models of transformers, which is no architecture of hfvlm.
    known = dict.fromkeys([*architectures(), *(name.split("/")[0] for name in list_presets())])
    if architecture not in (None, *known):
        raise ValueError(f"No architecture is called {architecture!r}; there are {', '.join(known)}.")
    presets = [load_preset(name) for name in list_presets(architecture)]
    if as_json:
        print_json([summary(preset) for preset in presets])
        return
    rows = [(preset.name, millions(preset), pixels(preset), licence_name(preset)) for preset in presets]
    print_table(rows, ("preset", "parameters", "pixels", "licence"))


def info(
    preset: Annotated[
        str, typer.Argument(help="A preset's name, as `hfvlm list` shows it.", autocompletion=known_presets)
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show one checkpoint: sizes, source, licence and configuration."""
    known = load_preset(preset)
    if as_json:
        print_json(summary(known) | {"source": known.source, "notes": known.notes} | settings(known))
        return
    rows = (
        ("preset", known.name),
        ("architecture", known.architecture),
        ("parameters", millions(known)),
        ("pixels", pixels(known)),
        ("files", " or ".join(known.source.get("files", ("none: sizes only",)))),
        ("source", known.source.get("url", "")),
        ("sha256", published_sha256(known)),
        ("parts", "; ".join(f"--part {part}=PATH: {what}" for part, what in known.source.get("parts", {}).items())),
        ("vocabulary", known.source.get("vocabulary", {}).get("url", "")),
        ("licence", licence_text(known).replace("\n", "; ")),
        ("notes", known.notes),
        *((name, json.dumps(value)) for name, value in settings(known).items()),
    )
    print_table(rows)


def published_sha256(preset: Preset) -> str:
    """Format what the authors publish of the hash of their file."""
    if "sha256_begins" in preset.source:
        return f"begins with {preset.source['sha256_begins']}"
    return preset.source.get("sha256", "not published")


def settings(preset: Preset) -> dict[str, Any]:
    """Return what differs from the architecture's defaults."""
    return {"configuration": preset.config, "processor": preset.processor}


def summary(preset: Preset) -> dict[str, Any]:
    """Summarise a preset for programs."""
    return {
        "preset": preset.name,
        "architecture": preset.architecture,
        "parameters": preset.parameters,
        "pixels": image_size(preset),
        "licence": preset.licence,
        "files": list(preset.source.get("files", ())),
        "url": preset.source.get("url"),
        "sha256": preset.source.get("sha256"),
    }


def millions(preset: Preset) -> str:
    """Format the number of parameters."""
    return f"{preset.parameters / 1e6:,.1f} M" if preset.parameters else "?"


def image_size(preset: Preset) -> Any:
    """Return the pixels of the first tower, or of the model, that has a size: a number or two; None for any."""
    config = preset.make_config()
    towers = (*(getattr(config, name) for name in config.sub_configs), config)
    return next((tower.image_size for tower in towers if hasattr(tower, "image_size")), None)


def pixels(preset: Preset) -> str:
    """Format the image size."""
    size = image_size(preset)
    if size is None:
        return "any"
    return str(size) if isinstance(size, int | str) else " x ".join(map(str, size))


def licence_name(preset: Preset) -> str:
    """Return the name or id of a preset's licence."""
    return line(preset.licence.get("name", preset.licence["id"]))


def licence_text(preset: Preset) -> str:
    """Return the licence with its link and note, a line each."""
    parts = (licence_name(preset), preset.licence.get("link", ""), preset.licence.get("note", ""))
    return "\n".join(part for part in parts if part)
