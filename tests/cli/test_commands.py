"""The command line, as a user types it."""

import pytest
from typer.testing import CliRunner

import hfvlm
from hfvlm.cli import main
from hfvlm.cli.commands import app
from tests.conftest import SHIPPED

runner = CliRunner()


def run(*arguments, code=0):
    result = runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_version():
    assert run("--version").strip() == hfvlm.__version__


def test_list_and_info():
    assert "clip/vit-b-32" in run("list")
    listed = run("list", "siglip")
    assert "siglip/vit-b-16-siglip2-naflex" in listed
    assert "clip/vit-b-32" not in listed
    shown = run("info", "vit-b-32")
    for words in (
        "151.3 M",
        "224",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        "out of scope",
    ):
        assert words in shown, words


def test_info_of_a_model_of_several_parts_and_no_images():
    shown = run("info", "languagebind/languagebind")
    assert "--part video=PATH: LanguageBind/LanguageBind_Video_FT" in shown
    assert "112 x 1036" in run("info", "languagebind_audio_ft")


def test_convert_verify_export_card(tmp_path):
    out = tmp_path / "out"
    printed = run("convert", SHIPPED / "clip-tiny.pt", "--preset", "clip/tiny", "-o", out, "--verify")
    assert "Licence of clip/tiny" in printed
    assert "all 101 tensors of clip-tiny.pt accounted for" in printed
    assert "eager attention equals sdpa" in printed
    assert "NO" not in printed
    run("export", out, "-o", tmp_path / "native")
    (out / "README.md").unlink()
    assert "README.md" in run("card", out)
    assert (out / "README.md").exists()


def test_verify_fails_loudly(tmp_path, clip_folder):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(clip_folder, tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(path)
    del tensors["text_model.post_norm.bias"]
    save_file(tensors, path, {"format": "pt"})
    assert "NO" in run("verify", tmp_path / "broken", code=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "vit-b-31"], "Did you mean vit-b-32"),
        (["list", "clap"], "No architecture is called 'clap'; there are "),
        (["convert", "absent.pt", "--preset", "clip/tiny", "-o", "out"], "absent.pt: no such file"),
        (["convert", "x.pt", "--preset", "clip/tiny", "-o", "out", "--part", "audio"], "--part takes NAME=PATH, not"),
    ],
)
def test_errors_are_one_line_without_traceback(arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["hfvlm", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert f"error: {words}" in printed or words in printed
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_push_asks_for_the_licence(clip_folder, tmp_path, monkeypatch):
    import json
    import shutil

    shutil.copytree(clip_folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"licence": "cc-by-nc-4.0"}))
    result = runner.invoke(app, ["push", str(tmp_path / "model"), "me/x"])
    assert "--i-have-read-the-licence" in str(result.exception)
    monkeypatch.setattr(hfvlm.release.hub.HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(
        hfvlm.release.hub.HfApi, "upload_folder", lambda *_, **__: "https://huggingface.co/me/x/commit/1"
    )
    assert "commit/1" in run("push", tmp_path / "model", "me/x", "--i-have-read-the-licence")
