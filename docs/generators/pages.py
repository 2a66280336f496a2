"""The pages of the documentation that are made when it is built, as a hook of mkdocs.

They are a page for each architecture, the reference of the API, and the files next to docs/ (README, CHANGELOG,
CONTRIBUTING, SECURITY).
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import hfvlm
from hfvlm.presets import Preset, list_presets, load_preset
from hfvlm.registry import architectures

ROOT = Path(__file__).parents[2]
DOCS, CARDS, RECIPES = ROOT / "docs", ROOT / "model_cards", ROOT / "examples" / "recipes"
DIAGRAMS = Path(__file__).parent / "diagrams"
BESIDE = {"README.md": "index.md"} | {
    name: name.lower() for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
}
# A card's sections that are filled for one checkpoint; the page has a table of all of them.
OF_ONE_CHECKPOINT = ("Measured", "Where the weights come from", "Licence")
MODULES = {
    "media": ("hfvlm.media",),
    "losses": ("hfvlm.losses",),
    "training": ("hfvlm.training", "hfvlm.training.chat", "hfvlm.training.rewards"),
    "evaluation": tuple(
        f"hfvlm.evaluation.{name}"
        for name in (
            *("tasks", "captioning", "answering", "retrieval", "classification", "metrics", "report", "comparison"),
            *("several", "robustness", "hallucination", "chair", "clip_score", "prompt_sets"),
        )
    ),
    "data": tuple(
        f"hfvlm.data.{name}"
        for name in (
            *("filtering", "rules", "dedupe", "near", "balance", "queries", "nouns", "phrases", "instruct"),
            *("writers", "endpoint", "bootstrapping", "procedure", "reading", "report"),
        )
    ),
    "checkpoints": ("hfvlm.checkpoints", "hfvlm.checkpoints.key_table"),
    "presets": ("hfvlm.presets",),
    "samples": ("hfvlm.samples.scenes", "hfvlm.samples.events", "hfvlm.samples.noisy_pairs"),
    "serving": tuple(f"hfvlm.serving.{name}" for name in ("app", "loading", "launch", "openai")),
}


def architecture_page(name: str) -> str:
    """Put together the page of an architecture: its diagram, card, checkpoints, parity, recipes and classes."""
    presets = [load_preset(each) for each in list_presets(name)]
    title, *sections = card_sections(name, presets)
    diagram = f"```mermaid\n{(DIAGRAMS / f'{name}.mmd').read_text(encoding='utf-8')}```\n"
    parts = [title, diagram, *sections, checkpoints(presets), parity(name), recipes(name, presets), classes(name)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def card_sections(name: str, presets: list[Preset]) -> Iterator[str]:
    """Give a card's parts that hold for all checkpoints, the first under the architecture's own name."""
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    text = text.replace("\n$notes\n", "").replace("# $name", f"# {architecture_title(name)}")
    text = text.replace("$name", example_folder(presets)).partition("Card written by hfvlm")[0]
    for part in re.split(r"^(?=## )", text, flags=re.MULTILINE):
        if not part.startswith(tuple(f"## {heading}\n" for heading in OF_ONE_CHECKPOINT)):
            yield part


def architecture_title(name: str) -> str:
    """The paper's spelling, as the classes have it."""
    return next(iter(architectures()[name].configs.values())).removeprefix("Hfvlm").removesuffix("Config")


def example_folder(presets: list[Preset]) -> str:
    """What a card's code calls the converted folder."""
    released = [preset for preset in presets if not preset.name.endswith("/tiny")]
    return released[0].name.rpartition("/")[2]


def checkpoints(presets: list[Preset]) -> str:
    rows = [
        "## Checkpoints",
        "",
        "| preset | parameters | licence | files | notes |",
        "|---|---|---|---|---|",
    ]
    for preset in presets:
        size = f"{preset.parameters / 1e6:,.0f} M" if preset.parameters else ""
        files = ", ".join(f"`{file}`" for file in preset.source.get("files", []))
        url = preset.source.get("url") or ""
        files = f"[{files or 'source'}]({url})" if url.startswith("https://") and url.count(" ") == 0 else files
        notes = " ".join(preset.notes.split()).replace("|", "\\|")
        rows.append(f"| `{preset.name}` | {size} | {preset.licence['id']} | {files} | {notes} |")
    return "\n".join(rows)


def parity(name: str) -> str:
    """Give the architecture's section of docs/parity.md without its table, and a link to that."""
    text = (DOCS / "parity.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if not found:
        return ""
    lines = [line for line in found[1].splitlines() if not line.startswith("|")]
    prose = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return f"## Faithful to the original\n\n{prose}\n\n[Each checkpoint's row](../parity.md#{name}) has its keys."


def recipes(name: str, presets: list[Preset]) -> str:
    """Name the recipes whose model is one of the architecture's, or a folder that begins with its name."""
    known = {preset.name.rpartition("/")[2] for preset in presets}
    rows = []
    for path in sorted(RECIPES.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        model = str(yaml.safe_load(text).get("model", ""))
        if model in known or re.match(rf"{name.replace('_', '[-_]')}(-|_|$)", model):
            first = re.match(r"# (.*?)[.:;\n]", text)
            rows.append(f"- `examples/recipes/{path.name}`: {first[1] if first else model}")
    return "\n".join(["## Recipes", "", *rows]) if rows else ""


def classes(name: str) -> str:
    """Ask mkdocstrings for the classes' docstrings."""
    folder = ROOT / "hfvlm" / "models" / name
    modules = [f"hfvlm.models.{name}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    shown = [module for module in modules if re.search(r"\.(configuration|modeling|processing)_", module)]
    return "\n\n".join(["## Classes", *(reference(module) for module in shown)])


def reference(name: str, level: int = 3) -> str:
    options = f"    options:\n      heading_level: {level}\n      show_root_heading: true"
    return f"::: {name}\n{options}"


def reference_pages() -> dict[str, str]:
    """Give the reference by rooms: the public functions and classes, then the modules whose contents are public."""
    rooms: dict[str, list[str]] = defaultdict(list)
    for name, module in hfvlm._LAZY.items():
        if module not in sum(MODULES.values(), ()):
            rooms[module.split(".")[1]].append(f"{module}.{name}")
    for room, modules in MODULES.items():
        rooms[room] += modules
    return {
        f"reference/{room}.md": "\n\n".join([f"# hfvlm.{room}", *(reference(name, 2) for name in names)]) + "\n"
        for room, names in sorted(rooms.items())
    }


def page_beside(name: str) -> str:
    """Give a page beside docs/ with its links as they are from within."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](").replace("](docs)", "](index.md)")
    for file, page in BESIDE.items():
        text = text.replace(f"]({file})", f"]({page})")
    return text


def generated() -> dict[str, str]:
    """Give every page that is made, by its path in the site."""
    pages = {page: page_beside(name) for name, page in BESIDE.items()}
    pages |= {f"architectures/{name}.md": architecture_page(name) for name in architectures()}
    return pages | reference_pages()


def on_config(config: Any) -> Any:
    """Add the pages that are made to the navigation."""
    made = {
        "Architectures": [f"architectures/{name}.md" for name in sorted(architectures())],
        "Reference": sorted(reference_pages()),
    }
    for entry in config.nav:
        for heading, pages in made.items():
            if heading in entry:
                entry[heading] = pages
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made to the site."""
    from mkdocs.structure.files import File

    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    return files
