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

import hfvlm
from hfvlm.cli.commands import app
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
# <!-- not run: the reason --> before a block leaves it out.
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n\n?)?```(?P<kind>python|console)\n(?P<code>.*?)```", re.DOTALL
)


def blocks(page):
    """Of a page's code: what it is, the line that it begins in, why it is not run, and itself."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        yield found["kind"], line, found["reason"], found["code"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, line, reason, code in blocks(page):
            where = f"{page.name}:{line}"
            if reason is None and kind == "python":
                exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
            elif reason is None:
                for command in commands(code):
                    run(command, where)
    assert "Traceback" not in capsys.readouterr().err


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
    left_out = {f"{page.name}:{line}": reason for page in PAGES for _, line, reason, _ in blocks(page) if reason}
    every = sum(1 for page in PAGES for _ in blocks(page))
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
            except ImportError:
                return False
    return True


def test_dir_names_what_there_is():
    names = dir(hfvlm)
    shown = {"Embedder", "Index", "FaissIndex", "LanceIndex", "Chat", "convert", "verify", "push", "HfvlmCLIPModel"}
    assert shown | set(hfvlm.__all__) <= set(names)
    assert names == sorted(names)
    assert not [name for name in names if not hasattr(hfvlm, name)]
    assert inspect.isfunction(hfvlm.convert)
