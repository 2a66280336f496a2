"""The code of README.md and docs/, run as it stands: offline, on a processor, with what ships."""

import contextlib
import inspect
import io
import re
import runpy
import shlex
import sys
import warnings

import pytest
import typer

import hfvlm
from docs.generators import open_clip
from docs.generators.pages import architecture_page, generated
from hfvlm.cli.commands import app
from hfvlm.presets import list_presets
from hfvlm.registry import architectures
from tests.support.folders import tiny_folder
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
BESIDE = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
# <!-- not run: the reason --> before a block leaves it out; <!-- integration: the reason --> to `make integrations`.
BLOCK = re.compile(
    r"(?:<!-- (?P<marker>not run|integration): (?P<reason>[^\n]+?) -->\n\n?)?"
    r"```(?P<kind>python|console)\n(?P<code>.*?)```",
    re.DOTALL,
)


def blocks(page, *, integration=False):
    """Of a page's code: what it is, the line that it begins in, why it is not run, and itself."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        reason = None if integration and found["marker"] == "integration" else found["reason"]
        yield found["kind"], line, reason, found["code"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_runs(page, tmp_path, monkeypatch, capsys):
    run_page(page, tmp_path, monkeypatch)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.integration
def test_the_code_of_neighbours_runs(tmp_path, monkeypatch, capsys):
    for package in ("langchain_core", "llama_index.core", "haystack", "lancedb", "qdrant_client"):
        pytest.importorskip(package, reason="comes with hfvlm[integrations]")
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    tiny_folder("filip", tmp_path / "filip")
    tiny_folder("llava", tmp_path / "llava")
    run_page(ROOT / "docs" / "neighbours.md", tmp_path, monkeypatch, integration=True)
    printed = capsys.readouterr()
    assert printed.out.count("photos/square.png\n") == 5, printed.out  # one of each neighbour's
    assert "Traceback" not in printed.err


def run_page(page, folder, monkeypatch, *, integration=False):
    """Run a page's code in a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    (folder / "examples").symlink_to(ROOT / "examples")
    names = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, line, reason, code in blocks(page, integration=integration):
            where = f"{page.name}:{line}"
            if reason is None and kind == "python":
                exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
            elif reason is None:
                for command in commands(code):
                    run(command, where)


def commands(code):
    """The lines of a console, continued ones as one, without comments."""
    lines = (shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def run(command, where):
    """Run `hfvlm ...` and `python script ...` in this process."""
    program, *arguments = command
    arguments = [substituted(argument) for argument in arguments]
    if program == "hfvlm":
        code = app(arguments, standalone_mode=False)
    elif program == "python":
        code = run_script(arguments)
    else:
        raise AssertionError(f"{where}: {program} is not run here; write before the block why not.")
    assert not code, f"{where}: {shlex.join(command)} ended with {code}"


def substituted(argument):
    """What bash makes of $(python -c '...')."""
    found = re.search(r"\$\(python -c '([^']*)'\)", argument)
    if not found:
        return argument
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(found[1], {})
    return argument.replace(found[0], printed.getvalue().strip())


def run_script(arguments):
    before, sys.argv = sys.argv, arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return 0


def test_the_first_code_of_the_readme_prints_a_number(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = next(code for kind, _, reason, code in blocks(PAGES[0]) if kind == "python" and reason is None)
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)
        exec(code, names)  # a cell is run again
    printed = capsys.readouterr().out
    assert re.search(r"'score': (0\.[5-9]\d*|1\.0), 'label': 'red circle'", printed), printed


def test_few_blocks_are_left_out():
    """Each says why: what it needs and this package has not."""
    found = [
        (f"{page.name}:{line}", reason) for page in PAGES for _, line, reason, _ in blocks(page, integration=True)
    ]
    left_out, every = {place: reason for place, reason in found if reason}, len(found)
    assert all(re.match(r"(needs|takes|asks|sets up) ", reason) for reason in left_out.values()), left_out
    assert len(left_out) <= every // 3, left_out


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda page: page.name)
def test_names_exist(page):
    """`hfvlm.x.y` in code and prose, and whole `hfvlm.x(...)` calls in it."""
    for name in sorted(set(re.findall(r"\bhfvlm((?:\.[A-Za-z_]\w*)+)", page.read_text(encoding="utf-8")))):
        assert resolved(name.split(".")[1:]), f"{page.name}: hfvlm{name}"


def resolved(parts):
    """Whether a dotted name under hfvlm leads to something, through modules and what they hold."""
    import importlib

    here, path = hfvlm, "hfvlm"
    for part in parts:
        path = f"{path}.{part}"
        try:
            here = getattr(here, part)
        except AttributeError:
            try:
                here = importlib.import_module(path)
            except ImportError as error:
                return not (error.name or "hfvlm").startswith("hfvlm")  # a module of hfvlm for what is not installed
    return True


LINK = re.compile(r"(?<!`)\]\((?!https?:|mailto:)(?P<file>[^)#\s]*)(?:#(?P<heading>[^)\s]+))?\)")


def headings(text):
    """The anchors of a page, as mkdocs and GitHub spell them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", [*PAGES, *BESIDE, *CARDS], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for found in LINK.finditer(page.read_text(encoding="utf-8")):
        target = (page.parent / found["file"]).resolve() if found["file"] else page
        assert target.exists(), f"{page.name}: {found[0]}"
        if found["heading"]:
            assert found["heading"] in headings(target.read_text(encoding="utf-8")), f"{page.name}: {found[0]}"


PLACE = re.compile(r"`((?:hfvlm|tests|conversion|examples|model_cards|modeling_configs)/[\w./-]*\w)`")


@pytest.mark.parametrize("page", [*PAGES, *BESIDE[1:]], ids=lambda page: page.name)
def test_files_that_are_named_are_there(page):
    named = PLACE.findall(page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


WRITTEN = sorted(
    path
    for folder in ("examples", "hfvlm", "conversion", "model_cards", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".md", ".py", ".yaml")
)


def test_commands_in_prose_have_the_options_that_are_written():
    """`hfvlm command ... --option` on pages and cards, in recipes, docstrings and messages."""
    commands = {tuple(name): command for name, command in every_command(typer.main.get_command(app))}
    wrong = []
    for path in [ROOT / "README.md", *BESIDE, *WRITTEN]:
        text = re.sub(r"\\\n\s*(?:# )?", " ", path.read_text(encoding="utf-8"))
        for found in re.finditer(r"(?<![\w/.-])hfvlm ((?:data )?[a-z]+)(?![\w.])([^\n`]*)", text):
            command = commands.get(tuple(found[1].split()))
            options = re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(r"\$\([^)]*\)", "", found[2]))
            known = {"--help"} | {name for option in getattr(command, "params", ()) for name in option.opts}
            wrong += [f"{path.name}: {found[0]}: {name}" for name in options if command and name not in known]
        for found in re.finditer(r"`hfvlm ((?:data )?[a-z]+) ((?:[A-Z]\w+ ?)+)`", text):  # `hfvlm command FILE ...`
            command = commands.get(tuple(found[1].split()))
            takes = [option for option in getattr(command, "params", ()) if option.param_type_name == "argument"]
            if command and len(found[2].split()) > len(takes) and all(option.nargs == 1 for option in takes):
                wrong.append(f"{path.name}: {found[0]}: {len(takes)} arguments")
    assert wrong == []


def every_command(group, names=()):
    """The commands of a group and of those in it, with their names."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command, (*names, name))
        else:
            yield (*names, name), command


def test_links_between_generated_pages_lead_somewhere():
    pages = {f"docs/{path}": text for path, text in generated().items()}
    for path, text in pages.items():
        for found in LINK.finditer(text):
            target = (ROOT / path).parent.joinpath(found["file"]).resolve() if found["file"] else ROOT / path
            assert target.exists() or str(target.relative_to(ROOT)) in pages, f"{path}: {found[0]}"


@pytest.mark.parametrize("name", sorted(architectures()))
def test_an_architecture_has_a_page(name):
    """It has a diagram, every checkpoint, the numbers of parity, and the classes; no field of a card is unfilled."""
    page = architecture_page(name)
    assert page.startswith("# ")
    assert "```mermaid\nflowchart" in page
    assert all(f"| `{preset}` |" in page for preset in list_presets(name))
    assert "## Faithful to the original\n\n" in page, f"docs/parity.md lacks {name}: make parity"
    assert f"::: hfvlm.models.{name}.modeling_{name}" in page
    assert not re.search(r"\$(name|notes|results|source|licence|version)\b", page)


def test_parity_has_a_row_for_each_checkpoint():
    text = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    for preset in list_presets():
        if not preset.endswith("/tiny"):
            assert f"| {preset.rpartition('/')[2]} |" in text, f"{preset}: make parity"


def test_open_clips_models_are_current():
    """Every name and tag of the commit has a row, and every tag of an image model a preset."""
    assert open_clip.PAGE.read_text(encoding="utf-8") == open_clip.page(), "make open-clip"
    models = open_clip.DATA["models"]
    assert (len(models), sum(map(len, models.values()))) == (119, 200)
    without = {name for name, tags in models.items() for preset in tags.values() if preset is None}
    assert without == set(open_clip.DATA["elsewhere"])
    assert all(name.startswith("CLAP-") for name in without)


def test_the_front_door_is_short():
    """README has at most 250 lines, six blocks of at most eight lines with a link each, and small screenshots."""
    text = PAGES[0].read_text(encoding="utf-8")
    assert text.count("\n") <= 250
    parts = re.split(r"^\*\*", text.split("## In eight lines each")[1].split("\n## ")[0], flags=re.MULTILINE)[1:]
    assert [part.split("*")[0] for part in parts] == ["Classify", "Search", "Caption", "Chat", "Fine-tune", "Convert"]
    for part in parts:
        assert "](docs/" in part
        assert all(found["code"].count("\n") <= 8 for found in BLOCK.finditer(part)), part
    for image in (ROOT / "docs" / "images").iterdir():
        assert image.stat().st_size < 200 * 1024, image.name


def test_dir_names_what_there_is():
    names = dir(hfvlm)
    shown = {"Embedder", "Index", "FaissIndex", "LanceIndex", "Chat", "convert", "verify", "push", "HfvlmCLIPModel"}
    assert shown | set(hfvlm.__all__) <= set(names)
    assert names == sorted(names)
    assert not [name for name in names if not hasattr(hfvlm, name)]
    assert inspect.isfunction(hfvlm.convert)
