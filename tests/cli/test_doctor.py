"""Which versions are known, and whether the self-test finds what it is there for."""

import json
import tomllib
import warnings

import pytest
import torch
from packaging.requirements import Requirement
from transformers import PreTrainedModel
from typer.testing import CliRunner

from hfvlm import versions
from hfvlm.cli import commands, doctor
from hfvlm.modeling import image_text
from hfvlm.models.clip import HfvlmCLIPVisionModel
from hfvlm.registry import architectures
from hfvlm.release import selftest
from hfvlm.versions import TESTED, UntestedVersionWarning, is_tested, warn_if_untested
from tests.support.paths import ROOT
from tests.support.processes import run_fresh

LLAVA = [case for case in selftest.CASES if case.name == "llava"]


def cli(*arguments):
    return CliRunner().invoke(commands.app, ["doctor", *arguments])


# Versions


def test_the_range_equals_pyprojects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
    assert Requirement(versions.RANGE).specifier == needed["transformers"].specifier
    assert all(is_tested(version) and needed["transformers"].specifier.contains(version) for version in TESTED)
    assert f"transformers=={TESTED[-1]}\n" in (ROOT / "constraints.txt").read_text()
    assert f"OLDEST := {TESTED[0]}\n" in (ROOT / "Makefile").read_text()
    newest = ".".join(TESTED[-1].split(".")[:2])
    for page in ("README.md", "docs/compatibility.md"):
        assert f"transformers {versions.OLDEST} to {newest}" in (ROOT / page).read_text(), page


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {pin.name.lower(): pin for pin in map(Requirement, (li for li in lines if li and not li.startswith("#")))}
    # `make integrations` takes the newest of everything.
    extras = [lines for name, lines in project["optional-dependencies"].items() if name != "integrations"]
    wanted = [*project["dependencies"], *(line for lines in extras for line in lines)]
    for requirement in map(Requirement, wanted):
        if requirement.name not in ("hfvlm", "flash-attn"):  # no build of the latter is for every machine
            (pin,) = pins[requirement.name.lower()].specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version), requirement.name


@pytest.mark.parametrize("version", ["4.57.1", "5.3.9", "5.25.0", "5.25.0rc1", "5.25.0.dev0", "6.0"])
def test_warns_of_a_version_that_is_not_known(version, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda _: version)
    with pytest.warns(UntestedVersionWarning, match=f"not with {version}.*hfvlm doctor") as caught:
        warn_if_untested()
    assert len(caught) == 1


@pytest.mark.parametrize("version", [*TESTED, "5.24.7", "5.4.0rc1", "5.24.1+local"])
def test_is_silent_about_a_version_that_is_known(version, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda _: version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested()


def test_an_import_warns_once_and_says_nothing_else():
    code = (
        "import importlib.metadata as m; v = m.version; m.version = lambda n: '5.99' if n == 'transformers' else v(n)"
    )
    run = run_fresh(f"{code}; import hfvlm, hfvlm.registry; hfvlm.HfvlmCLIPModel.config_class")
    assert run.stdout == ""
    lines = [line for line in run.stderr.splitlines() if "Warning" in line]
    assert len(lines) == 1
    assert "5.99" in lines[0]
    assert "hfvlm doctor" in lines[0]


# Self-test


def test_every_architecture_that_generates_has_a_case():
    classes = {
        name: getattr(found, name)
        for found in architectures().values()
        for group in found.models.values()
        for name in group
    }
    generate = {name for name, kind in classes.items() if issubclass(kind, PreTrainedModel) and kind.can_generate()}
    folders = {kind.__module__.split(".")[2] for name, kind in classes.items() if name in generate}
    assert {case.architecture for case in selftest.CASES} == folders


def test_the_self_test_passes():
    results = selftest.run()
    assert [result.name for result in results if not result.passed] == []
    assert sum(result.seconds for result in results) < 120  # on a machine that others use, too


def failures(monkeypatch=None):
    (result,) = selftest.run(LLAVA)
    return result.failures


def test_finds_a_forward_that_ignores_its_cache(monkeypatch):
    monkeypatch.setattr(image_text, "with_cache", lambda cache: {})
    assert "with a cache it generates another text than without" in failures()


def test_finds_attention_that_differs_between_implementations(monkeypatch):
    real = HfvlmCLIPVisionModel.forward

    def forward(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        if self.config._attn_implementation == "eager":
            output.last_hidden_state.mul_(1.1)
            for hidden in output.hidden_states or ():
                hidden.mul_(1.1)
        return output

    monkeypatch.setattr(HfvlmCLIPVisionModel, "forward", forward)
    assert failures() == ["eager and sdpa attention differ"]


def test_finds_weights_that_are_lost(monkeypatch):
    real = PreTrainedModel.from_pretrained.__func__

    def load(cls, *args, **kwargs):
        model = real(cls, *args, **kwargs)
        with torch.no_grad():
            next(model.language_model.parameters()).mul_(1.5)
        return model

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load))
    assert failures() == ["it is another model after saving and loading"]


def test_an_error_is_a_failure(monkeypatch):
    def forward(self, *args, **kwargs):
        raise TypeError("no such argument")

    monkeypatch.setattr(HfvlmCLIPVisionModel, "forward", forward)
    assert failures() == ["TypeError: no such argument"]


# The command


def test_reports_as_json():
    result = cli("--json", "--no-tests")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["packages"]["transformers"]["installed"] == versions.installed_version("transformers")
    assert report["extras"]["demo"]["packages"].keys() >= {"peft", "scikit-learn"}
    assert report["devices"][0].startswith("cpu")
    assert "dev" not in report["extras"]


def test_names_the_pip_line_of_a_missing_extra(monkeypatch):
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "av" else real(name))
    result = cli("--no-tests")
    assert result.exit_code == 0
    assert "av missing: pip install 'hfvlm[video]'" in result.stdout


def test_a_package_that_is_too_old_fails(monkeypatch):
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: "2.1" if name == "torch" else real(name))
    result = cli("--no-tests")
    assert result.exit_code == 1
    assert "pip install 'torch>=2.10'" in result.stdout


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_failed_self_test_is_reported_and_fails(arguments, monkeypatch):
    broken = selftest.Result("llava", ["with a cache it generates another text than without"], 0.1)

    def run(report):
        report(broken)
        return [broken]

    monkeypatch.setattr(selftest, "run", run)
    result = cli(*arguments)
    assert result.exit_code == 1
    assert "with a cache it generates another text than without" in result.stdout


def test_an_unknown_transformers_is_named_and_tested(monkeypatch):
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: "5.99.0" if name == "transformers" else real(name))
    result = cli("--no-tests")
    assert result.exit_code == 0
    assert f"not one that hfvlm was tested with: {versions.RANGE}" in result.stdout
