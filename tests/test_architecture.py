"""The house: rooms on floors, from which imports go down only, and architectures that repeat nothing."""

import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# A room is a package or a loose module of hfvlm, or conversion/; it may import from the floors below its own.
FLOORS = (
    ("checks", "logs", "versions"),
    ("checkpoints", "configuration", "losses", "media", "registry", "samples", "writing"),
    ("modules", "presets"),
    ("modeling", "processing"),
    ("inference", "models"),
    ("conversion", "evaluation", "serving"),
    ("data", "release", "training"),
    ("auto", "cli", "integrations"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DOORS = {"__init__", "__main__"}  # `import hfvlm` and `python -m hfvlm` lead everywhere
LARGEST_SHARE_REPEATED, WINDOW = 0.02, 10


def sources() -> Iterator[Path]:
    yield from sorted((ROOT / "hfvlm").rglob("*.py"))
    yield from sorted((ROOT / "conversion").rglob("*.py"))


def room_of(module: str) -> str:
    """The room of a dotted name: "hfvlm.modeling.vision" is in modeling."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module of hfvlm that a file imports, at its top or in a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hfvlm":
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "hfvlm")


def arrows() -> dict[tuple[str, str], set[str]]:
    """Which rooms import which others, with the files that do."""
    found = defaultdict(set)
    for path in sources():
        parts = path.relative_to(ROOT).with_suffix("").parts
        room = parts[0] if parts[0] == "conversion" else parts[1]
        for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if (other := room_of(module)) != room:
                found[room, other].add(str(path.relative_to(ROOT)))
    return found


def test_imports_go_down():
    up = {
        f"{room} -> {other}": sorted(files)
        for (room, other), files in arrows().items()
        if room not in DOORS and FLOOR_OF[room] <= FLOOR_OF.get(other, len(FLOORS))
    }
    assert up == {}


def test_every_room_is_on_a_floor():
    loose = {path.stem for path in (ROOT / "hfvlm").glob("*.py")}
    packages = {path.parent.name for path in (ROOT / "hfvlm").glob("*/__init__.py")} | {"conversion"}
    assert (loose | packages) - DOORS == set(FLOOR_OF)
    assert len(loose) <= 8
    assert len(FLOORS) <= 8


def code_of(path: Path) -> list[str]:
    """The lines of a file that are code: without docstrings, comments, blank lines and imports."""
    text = path.read_text(encoding="utf-8")
    tree, left_out = ast.parse(text), set()
    for node in ast.walk(tree):
        docstring = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    lines: dict[int, list[str]] = defaultdict(list)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            lines[token.start[0]].append(token.string)
    return [" ".join(words) for number, words in sorted(lines.items()) if number not in left_out and any(words)]


def test_architectures_repeat_nothing():
    """Of the code in hfvlm/models, the share that stands in ten equal lines in two places."""
    places, lines = defaultdict(list), 0
    for path in sorted((ROOT / "hfvlm" / "models").rglob("*.py")):
        code = code_of(path)
        lines += len(code)
        for start in range(len(code) - WINDOW + 1):
            places[tuple(code[start : start + WINDOW])].append((path, start))
    twice = [where for found in places.values() if len(found) > 1 for where in found]
    repeated = {(path, start + offset) for path, start in twice for offset in range(WINDOW)}
    assert len(repeated) / lines < LARGEST_SHARE_REPEATED, sorted(
        (str(path.relative_to(ROOT)), line) for path, line in repeated
    )


@pytest.mark.parametrize("folder", sorted((ROOT / "hfvlm" / "models").glob("*/")), ids=lambda path: path.name)
def test_architectures_are_small(folder):
    """Model and configuration have at most 800 lines; where they have more, the docstring gives the reason."""
    if folder.name.startswith("__"):
        return
    files = [*folder.glob("configuration_*.py"), *folder.glob("modeling_*.py")]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    text = ast.get_docstring(ast.parse((folder / f"modeling_{folder.name}.py").read_text(encoding="utf-8"))) or ""
    assert lines <= 800 or "longer than other" in text
