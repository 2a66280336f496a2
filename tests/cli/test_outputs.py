"""What the command prints: plain lines, JSON, errors that can be copied; and what it never touches."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import transformers
from PIL import Image
from typer.testing import CliRunner

import hfvlm
from hfvlm.cli import console, main
from hfvlm.cli.commands import app
from hfvlm.cli.console import line, neutral
from hfvlm.cli.options import pairs, processor_options
from hfvlm.presets import list_presets
from tests.conftest import SHIPPED
from tests.support.processes import run_fresh

runner = CliRunner()
ESCAPES = "\x1b[31mred\x1b[0m\x07\u202etxt.exe\r"


@pytest.fixture
def hfvlm_command(monkeypatch, capfd):
    """Run the command from its entry point -> stdout and stderr, also of what libraries print themselves."""

    def run(*arguments, code=0, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.argv", ["hfvlm", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capfd.readouterr()
        assert stop.value.code == code, printed.err
        return printed.out, printed.err

    return run


def invoked(*arguments, code=0):
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["--show-completion", "bash"]])
def test_help_imports_nothing_heavy(arguments):
    code = "import sys; sys.argv = ['hfvlm', *sys.argv[1:]]\ntry:\n from hfvlm.cli import main\n main()\n"
    code += "finally:\n print('LOADED', [m for m in HEAVY if m in sys.modules], file=sys.stderr)"
    heavy = "HEAVY = ('torch', 'transformers', 'numpy', 'huggingface_hub', 'PIL', 'datasets', 'peft', 'yaml')\n"
    # The shell is named here: a test may run in none that could be found.
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-c", heavy + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout
    assert "LOADED []" in done.stderr


def test_every_command_has_help_and_completion():
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert "--quiet" in invoked(name, "--help").output
    assert "--install-completion" in invoked("--help").output


def test_completion_knows_the_presets():
    code = "import sys; sys.argv = ['hfvlm']; from hfvlm.cli import main; main()"
    asked = {"_HFVLM_COMPLETE": "complete_bash", "_TYPER_COMPLETE_ARGS": "hfvlm info clip/vit-b-1"}
    asked |= {"COMP_WORDS": "hfvlm info clip/vit-b-1", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | asked
    )
    assert "clip/vit-b-16" in done.stdout.split(), done
    assert "clip/vit-b-32" not in done.stdout


def test_names_are_whole_in_narrow_pipes(hfvlm_command):
    printed, _ = hfvlm_command("list", COLUMNS="40")
    assert [text.split()[0] for text in printed.splitlines()[1:]] == list(list_presets())
    found = json.loads(hfvlm_command("list", "clip", "--json", COLUMNS="40")[0])
    assert [preset["preset"] for preset in found] == list(list_presets("clip"))
    assert found[0].keys() >= {"parameters", "pixels", "licence", "files", "url", "sha256"}


def test_info_is_whole_and_for_programs(hfvlm_command):
    printed, _ = hfvlm_command("info", "vit-b-32", COLUMNS="30")
    assert "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af" in printed
    about = json.loads(hfvlm_command("info", "vit-b-32", "--json")[0])
    assert about["configuration"] == hfvlm.load_preset("clip/vit-b-32").config
    assert about["licence"] == hfvlm.load_preset("clip/vit-b-32").licence


def test_a_pipe_that_closes_early_is_no_error():
    code = """
        import os, sys
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        sys.argv[1:] = ["list"]
        from hfvlm.cli import main
        main()
    """
    done = run_fresh(code, check=False)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("name", ["a [red] circle.jpg", "[/INST]", "[bold]x[/bold]", ":smile: [link=x]y"])
def test_nothing_is_markup(name, monkeypatch, capsys):
    assert neutral(name) == name
    monkeypatch.setattr("sys.argv", ["hfvlm", "convert", name, "--preset", "clip/tiny", "-o", "out"])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert f"error: {name}: no such file" in capsys.readouterr().err


def test_what_a_terminal_would_obey_is_written_out(monkeypatch, capsys):
    assert neutral(ESCAPES) == r"\x1b[31mred\x1b[0m\x07\u202etxt.exe\r"
    assert line("a\nb\tc") == r"a\nb\tc"
    assert neutral("a\nb\tc é 日本 👩‍👩‍👧") == "a\nb\tc é 日本 👩‍👩‍👧"
    assert neutral("\udcff") == r"\udcff"
    for arguments, code in (
        (["convert", ESCAPES, "--preset", "clip/tiny", "-o", "out"], 1),
        (["convert", "x", "--preset", ESCAPES, "-o", "out"], 1),
        (["verify", ESCAPES], 2),
        (["info", "vit-b-32", ESCAPES], 2),
        (["list", f"--{ESCAPES}"], 2),
        ([ESCAPES], 2),
    ):
        monkeypatch.setattr("sys.argv", ["hfvlm", *arguments])
        with pytest.raises(SystemExit, match=str(code)):
            main()
        printed = "".join(capsys.readouterr())
        assert printed
        assert not {"\x1b", "\x07", "\u202e"} & set(printed), arguments


def test_remedies_can_be_pasted(hfvlm_command, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    _, error = hfvlm_command("demo", code=1)
    assert "`pip install 'hfvlm[demo]'`" in error


BAD_NUMBERS = {
    "embed": ([".", "-o", "out", "-m", "m"], ["--batch-size=0", "--batch-size=-1", "--shard-rows=0", "--dtype=int8"]),
    "search": (["INDEX", "--text", "x"], ["-k=0", "--dtype=foo", "--option=audio=1", "--option=rate"]),
    "eval": (
        ["MODEL", "--data", "."],
        ["--task=dream", "--task=vqa --limit=0", "--task=vqa --templates=name", "--task=vqa --modality=audio"],
    ),
    "capfilt": (
        [".", "-o", "out", "--captioner", "c", "--judge", "j"], ["--threshold=1.5", "--threshold=nan", "--seed=-1"]
    ),
    "chat": (["MODEL"], ["--max-new-tokens=0", "--temperature=-1", "--temperature=nan", "--temperature=inf"]),
    "demo": ([], ["--seed=-1"]),
    "convert": (["x", "--preset", "clip/tiny", "-o", "out"], ["--dtype=int8", "--dtype=foo"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "option"), [(name, option) for name, (_, options) in BAD_NUMBERS.items() for option in options]
)
def test_numbers_and_names_are_checked(command, option, clip_folder, embedded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [{"MODEL": clip_folder, "INDEX": embedded}.get(text, text) for text in BAD_NUMBERS[command][0]]
    parts = option.replace("-k=", "-k ").split()
    output = invoked(command, *given, *parts, code=2).output
    assert parts[-1].split("=")[0] in output or "-k" in output
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there(clip_folder, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    for device in ("cuda", "cuda:3", "gpu", "meta"):
        result = invoked("embed", tmp_path, "-o", tmp_path / "out", "-m", clip_folder, "--device", device, code=2)
        assert "--device" in result.output
        assert "this machine has cpu" in result.output
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    from hfvlm.cli.options import checked_device

    assert checked_device("cuda:1") == "cuda:1"
    with pytest.raises(Exception, match="this machine has cpu, cuda, cuda:0, cuda:1"):
        checked_device("cuda:2")


def test_pairs_and_processor_options():
    assert pairs(["image=a=b", "text=c"], "--column") == {"image": "a=b", "text": "c"}
    for wrong in (["image"], ["=x"], ["image="], ["a=b", "a=c"]):
        with pytest.raises(Exception, match="write NAME=COLUMN|given twice"):
            pairs(wrong, "--column")
    given = ["audio.sampling_rate=16000", "thermal.limits=[10, 40]", "depth.encoding=tum"]
    assert processor_options(given) == {
        "audio": {"sampling_rate": 16000}, "thermal": {"limits": [10, 40]}, "depth": {"encoding": "tum"}
    }  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    random = np.random.RandomState(0)
    rows = []
    for i in range(4):
        name = f"{i} [red] circle.png"
        Image.fromarray(random.randint(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / name)
        rows.append({"file_name": name, "text": f"image [{i}]", "label": "ab"[i % 2]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, images, clip_folder):
    from hfvlm.inference.embed import embed

    return embed(images, tmp_path_factory.mktemp("embedded") / "out", clip_folder)


def test_search_prints_names_as_they_are_and_json(embedded, tmp_path):
    printed = invoked("search", embedded, "--text", "[/INST] [red]", "-k", "2").stdout
    assert all("[red] circle.png" in text for text in printed.splitlines())
    found = json.loads(invoked("search", embedded, "--text", "red", "--json").stdout)
    assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)
    assert {hit["text"] for hit in found} == {f"image [{i}]" for i in range(4)}
    page, grid = tmp_path / "page.html", tmp_path / "grid.png"
    for _ in range(2):  # its own files are replaced
        invoked("search", embedded, "--text", "red", "--html", page, "--grid", grid)
    assert "image [3]" in page.read_text()


@pytest.mark.parametrize("option", ["--html", "--grid"])
def test_search_replaces_no_file_of_others(embedded, tmp_path, option):
    mine = tmp_path / "mine.png"
    Image.new("RGB", (4, 4)).save(mine)
    before = mine.read_bytes()
    result = invoked("search", embedded, "--text", "red", option, mine, code=1)
    assert "hfvlm did not write it" in str(result.exception)
    assert mine.read_bytes() == before
    invoked("search", embedded, "--text", "red", option, mine, "--overwrite")
    assert mine.read_bytes() != before


def test_an_index_without_vectors_is_an_error(embedded, tmp_path):
    (tmp_path / "embed.json").write_text((embedded / "embed.json").read_text())
    assert "holds no vector of image" in str(invoked("search", tmp_path, "--text", "x", code=1).exception)
    assert "'sound' is none of image, text" in invoked("search", embedded, "--text=x", "--among=sound", code=2).output
    assert "give one of --image, --text" in str(invoked("search", embedded, code=1).exception)


def test_options_reach_the_processor(images, clip_folder, tmp_path):
    from hfvlm.inference.embed import read_settings

    common = ["embed", images, "-m", clip_folder]
    invoked(*common, "-o", tmp_path / "out", "--option", "text.max_length=5", "--option", "text.truncation=true")
    assert read_settings(tmp_path / "out")["source_options"] == {"text": {"max_length": 5, "truncation": True}}
    result = invoked(*common, "-o", tmp_path / "other", "--option", "image.colour=blue", code=2)
    assert "--option" in result.output
    assert "colour" in result.output
    result = invoked(*common, "-o", tmp_path / "other", "--option", "audio.sampling_rate=16000", code=1)
    assert "source_options are given for audio, which is not embedded" in str(result.exception)


@pytest.fixture
def precious(tmp_path):
    """A folder with what no program wrote."""
    folder = tmp_path / "precious"
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis" / "chapter.txt").write_text("years of work")
    (folder / "notes.txt").write_text("mine")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_demo_deletes_nothing(precious):
    before = contents(precious)
    assert "has notes.txt, which no demo wrote" in str(invoked("demo", "-o", precious, code=1).exception)
    (precious / "notes.txt").unlink()
    (precious / "thesis").rename(precious / "clip-tiny")
    assert "has chapter.txt, which no demo" in str(invoked("demo", "-o", precious, code=1).exception)
    (precious / "clip-tiny" / "chapter.txt").rename(precious / "clip-tiny" / "config.json")
    assert "no demo wrote it" in str(invoked("demo", "-o", precious, code=1).exception)
    assert contents(precious)["clip-tiny/config.json"] == before["thesis/chapter.txt"]


@pytest.mark.parametrize("command", ["convert", "export", "merge"])
def test_overwrite_replaces_only_models_of_hfvlm(command, precious, clip_folder, tmp_path):
    given = {"export": [clip_folder], "merge": [clip_folder], "convert": [SHIPPED / "clip-tiny.pt"]}
    arguments = [command, *given[command], "-o", precious, "--overwrite"]
    arguments += ["--preset", "clip/tiny"] if command == "convert" else []
    before = contents(precious)
    assert "hfvlm did not write" in str(invoked(*arguments, code=1).exception)
    assert contents(precious) == before
    shutil.rmtree(precious)
    precious.mkdir()
    (precious / "config.json").write_text('{"model_type": "bert"}')
    assert "was not written by hfvlm" in str(invoked(*arguments, code=1).exception)
    if command != "merge":
        (precious / "config.json").unlink()
        invoked(*arguments)
        invoked(*arguments)


def test_eval_writes_beside_what_is_there(images, clip_folder, precious):
    before = contents(precious)
    common = ["eval", clip_folder, "--task", "zero-shot", "--data", images, "--split", "train", "-o", precious]
    report = json.loads(invoked(*common, "--json").stdout)
    assert report["task"] == "zero-shot"
    assert report["rows"] == 4
    assert before.items() <= contents(precious).items()
    assert json.loads((precious / "report.json").read_text()) == report
    invoked(*common)
    (precious / "report.json").write_text('{"mine": true}')
    assert "hfvlm did not write it" in str(invoked(*common, code=1).exception)
    assert (precious / "report.json").read_text() == '{"mine": true}'
    assert not [path for path in precious.parent.iterdir() if path.name.startswith(".")]


def test_cards_that_somebody_wrote_stay(clip_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(clip_folder, folder)
    invoked("card", folder)
    (folder / "README.md").write_text("# My own words")
    assert "hfvlm did not write it" in str(invoked("card", folder, code=1).exception)
    assert (folder / "README.md").read_text() == "# My own words"
    invoked("card", folder, "--overwrite")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# Model Card for Model ID")
    invoked("card", folder)
    assert "library_name: hfvlm" in (folder / "README.md").read_text()


def test_verify_for_programs(clip_folder):
    found = json.loads(invoked("verify", clip_folder, "--json").stdout)
    assert found["passed"] is True
    assert {"name", "passed", "detail"} <= found["checks"][0].keys()


def test_quiet_prints_results_only(tmp_path, hfvlm_command, monkeypatch):
    """In a process of its own where libraries read at their import how much they may print."""
    code = "import warnings; warnings.simplefilter('ignore', FutureWarning); import hfvlm.__main__"
    arguments = ["convert", SHIPPED / "clip-tiny.pt", "--preset", "clip/tiny", "-o", tmp_path / "m", "-q"]
    done = run_fresh(code, *arguments)
    assert (done.stdout, done.stderr) == ("", "")
    monkeypatch.setattr(console._State, "quiet", False)  # which the next command sets, and the last one must not
    for name in console.QUIET:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    assert hfvlm_command("--quiet", "card", tmp_path / "m") == ("", "")
    out, error = hfvlm_command("list", "clip", "-q")
    assert "clip/vit-b-32" in out
    assert error == ""
    _, error = hfvlm_command("info", "vit-b-31", "-q", code=1)
    assert "Did you mean" in error


def test_weights_are_loaded_without_bars(clip_folder, images, tmp_path, hfvlm_command):
    transformers.utils.logging.enable_progress_bar()
    _, error = hfvlm_command("embed", images, "-m", clip_folder, "-o", tmp_path / "out")
    assert not transformers.utils.logging.is_progress_bar_enabled()
    assert "Loading weights" not in error


def test_push_shows_what_it_would_upload(clip_folder, monkeypatch):
    asked = {}

    @dataclass
    class Upload:
        repo_id: str
        files: dict

        def __str__(self):
            return "\n".join(self.files)

    def push(folder, repository, **options):
        asked.update(options, folder=folder, repository=repository)
        return Upload(repository, {"README.md": 10, "model.safetensors": 1000})

    monkeypatch.setattr("hfvlm.release.hub.push", push)
    printed = invoked("push", clip_folder, "me/x", "--dry-run").stdout
    assert printed.split() == ["README.md", "model.safetensors"]
    assert asked["dry_run"] is True
    shown = json.loads(invoked("push", clip_folder, "me/x", "--dry-run", "--json").stdout)
    assert shown == {"repo_id": "me/x", "dry_run": True, "files": {"README.md": 10, "model.safetensors": 1000}}


def test_rows_that_cannot_be_read_are_counted(capsys):
    from hfvlm.cli.evaluation import print_report
    from hfvlm.evaluation.report import Report, Result

    errors = {3: "image 3: [red] \x1b[31m is no image"} | dict.fromkeys(range(10, 16), "gone")
    print_report(Report("zero-shot", "m", "d", 93, {}, [Result("accuracy", 0.5)], errors=errors))
    printed = capsys.readouterr().out
    assert "accuracy: 0.5000" in printed
    assert "7 of 100 rows could not be read and are left out" in printed
    assert r"row 3: image 3: [red] \x1b[31m is no image" in printed
