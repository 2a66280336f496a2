"""`hfvlm doctor`: what is installed, what is missing, and whether hfvlm's results are right with it."""

import json
import platform
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement

from hfvlm.cli.options import Json, Quiet
from hfvlm.versions import RANGE, __version__, installed_version, is_tested

# Extras of those who work on hfvlm.
NOT_SHOWN = ("dev",)


def doctor(
    as_json: Json = False,
    tests: Annotated[bool, typer.Option(help="Test a small model of each architecture that generates.")] = True,
    quiet: Quiet = False,
) -> None:
    """Show versions, extras and devices, and test every architecture that generates; exit with 1 if a test fails."""
    report: dict[str, Any] = {
        "hfvlm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "transformers": {"tested": RANGE, "in_range": is_tested(installed_version("transformers") or "0")},
        "packages": packages(),
        "extras": extras(),
        "devices": devices(),
    }
    if not as_json:
        show(report)
    if tests:
        report["tests"] = self_tests(aloud=not as_json)
    failed = [test["name"] for test in report.get("tests", []) if test["failures"]]
    broken = [name for name, package in report["packages"].items() if not package["fits"]]
    report["ok"] = not failed and not broken
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        typer.echo(verdict(failed, broken))
    if not report["ok"]:
        sys.exit(1)


def requirements() -> list[Requirement]:
    """Read what hfvlm needs: in a checkout from pyproject.toml, else from the installed package."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    if file.exists() and (project := tomllib.loads(file.read_text()).get("project", {})).get("name") == "hfvlm":
        optional = project["optional-dependencies"]
        marked = [f'{line}; extra == "{extra}"' for extra, lines in optional.items() for line in lines]
        return [Requirement(line) for line in (*project["dependencies"], *marked)]
    try:
        return [Requirement(line) for line in requires("hfvlm") or ()]
    except PackageNotFoundError:
        return []


def state_of(requirement: Requirement) -> dict[str, Any]:
    """Return which version is installed, and whether hfvlm takes it."""
    installed = installed_version(requirement.name)
    fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
    return {"installed": installed, "needs": str(requirement.specifier), "fits": fits}


def packages() -> dict[str, dict[str, Any]]:
    """Return the state of what hfvlm cannot do without. An unknown transformers is warned of, and tested."""
    needed = [requirement for requirement in requirements() if requirement.marker is None]
    states = {requirement.name: state_of(requirement) for requirement in needed}
    if "transformers" in states and states["transformers"]["installed"]:
        states["transformers"]["fits"] = True
    return states


def extras() -> dict[str, dict[str, Any]]:
    """Return each extra's packages, and the line that installs what it lacks."""
    every = [requirement for requirement in requirements() if requirement.marker is not None]
    names = sorted({str(requirement.marker).split('"')[-2] for requirement in every} - set(NOT_SHOWN))

    def of(extra: str) -> dict[str, dict[str, Any]]:
        states: dict[str, dict[str, Any]] = {}
        for requirement in every:
            if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
                continue
            if requirement.name == "hfvlm":  # an extra that is made of others
                for other in requirement.extras:
                    states |= of(other)
            else:
                states[requirement.name] = state_of(requirement)
        return states

    found = {}
    for name in names:
        states = of(name)
        present = all(state["fits"] for state in states.values())
        found[name] = {"present": present, "packages": states, "remedy": f"pip install 'hfvlm[{name}]'"}
    return found


def devices() -> list[str]:
    """List the devices that models can run on."""
    import torch

    found = [f"cpu, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        found += [f"cuda:{i}, {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    if torch.xpu.is_available():
        found.append("xpu")
    return found


def self_tests(*, aloud: bool) -> list[dict[str, Any]]:
    """Run the self-test, and print each result as it comes."""
    from hfvlm.release.selftest import Result, run

    def report(result: Result) -> None:
        if aloud:
            outcome = "right" if result.passed else "WRONG: " + "; ".join(result.failures)
            typer.echo(f"  {result.name:<22} {outcome}")

    if aloud:
        typer.echo("\nwith a cache as without, as one forward predicts, eager as sdpa, loaded as saved:")
    results = run(report=report)
    return [{"name": r.name, "failures": r.failures, "seconds": round(r.seconds, 2)} for r in results]


def show(report: dict[str, Any]) -> None:
    """Print the report, but for the tests."""
    typer.echo(f"hfvlm {report['hfvlm']}, Python {report['python']}, {report['platform']}\n")
    for name, package in report["packages"].items():
        remark = "" if package["fits"] else f"  NOT {package['needs']}: pip install '{name}{package['needs']}'"
        typer.echo(f"  {name:<22} {package['installed'] or 'missing'}{remark}")
    if not report["transformers"]["in_range"]:
        typer.echo(f"\nThis transformers is not one that hfvlm was tested with: {RANGE}.")
    typer.echo("\nextras")
    for name, extra in report["extras"].items():
        missing = [
            f"{package} {state['installed'] or 'missing'}"
            for package, state in extra["packages"].items()
            if not state["fits"]
        ]
        outcome = f"{', '.join(missing)}: {extra['remedy']}" if missing else "there"
        typer.echo(f"  {name:<22} {outcome}")
    typer.echo(f"\ndevices: {'; '.join(report['devices'])}")


def verdict(failed: list[str], broken: list[str]) -> str:
    """Return the last line to print."""
    if failed:
        return f"\nWrong with these versions: {', '.join(failed)}. pip install '{RANGE}' is known to be right."
    if broken:
        return f"\nMissing, or of a version that hfvlm does not take: {', '.join(broken)}."
    return "\nAll is well."
