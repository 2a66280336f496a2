"""Run the tests on other versions of transformers: `make test-matrix`, `make test-oldest`.

Each version gets a virtual environment of its own, which shares the packages of .venv by a path file: only
transformers and what that version needs otherwise is installed.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from hfvlm.versions import TESTED, numbers
from tests.support.paths import ROOT

TABLE = ROOT / "docs" / "compatibility.md"
# What each column of the table runs.
PARTS = {
    "generation": [
        "tests/modeling/test_generation.py",
        "tests/modeling/test_soft_prompts.py",
        "tests/inference/test_chat.py",
    ],
    "contracts": [
        "tests/modeling/test_keywords.py",
        "tests/modeling/test_seams.py",
        "tests/modeling/test_resizing.py",
        "tests/processing/test_strictness.py",
        "tests/test_registry.py",
    ],
    "goldens": ["tests/test_goldens.py", "tests/test_conversion.py", "tests/test_golden_runners.py"],
    "models": ["tests/models"],
}
MARK = "<!-- written by make test-matrix: {} -->"


def environment(version: str, base: Path) -> Path:
    """Make the environment of a version, unless it is there; return its Python."""
    folder = ROOT / ".venv-matrix" / version
    python = folder / "bin" / "python"
    if not (folder / ".done").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
        (own,) = folder.glob("lib/python*/site-packages")
        (shared,) = base.glob("lib/python*/site-packages")
        (own / "shared.pth").write_text(f"{shared}\n{ROOT}\n")
        pip = [base / "bin" / "python", "-m", "pip", "--python", python, "install", "--quiet"]
        subprocess.run([*pip, f"transformers=={version}"], check=True)
        (folder / ".done").touch()
    return python


def run(python: Path, arguments: Iterable[str]) -> tuple[int, str]:
    """Run tests; return the exit code and the line of counts that pytest ends with."""
    command = [python, "-m", "pytest", "--numprocesses", "2", "--dist", "worksteal", "--quiet", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    counts = "no result"
    for line in process.stdout or ():
        sys.stdout.write(line)
        if re.search(r"\d+ (passed|failed|error)", line):
            counts = re.sub(r"^=* ?| in [\d.:a-z() ]+=*$", "", line.strip())
    return process.wait(), counts


def write(results: dict[str, dict[str, str]], page: Path = TABLE) -> None:
    """Put a row for each version that was run into the documentation's table; other tested versions keep theirs."""
    begin, end = (MARK.format(word) for word in ("begin", "end"))
    before, rest = page.read_text().split(begin)
    old, after = rest.split(end)
    rows = {
        version: row for row, version in re.findall(r"^(\| (\d[\w.]*) \|.*)$", old, re.MULTILINE) if version in TESTED
    }
    run_on = f"{datetime.now(UTC).date().isoformat()}, Python {sys.version.split()[0]}"
    for version, counts in results.items():
        cells = (version, run_on, *(counts.get(part, "not run") for part in PARTS))
        rows[version] = f"| {' | '.join(cells)} |"
    head = f"| transformers | run on | {' | '.join(PARTS)} |", f"|{' --- |' * (len(PARTS) + 2)}"
    table = "\n".join([*head, *(rows[version] for version in sorted(rows, key=numbers))])
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=ROOT / ".venv", help="the environment whose packages are shared")
    parser.add_argument("--versions", nargs="+", default=TESTED)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--all", action="store_true", help="all tests, without writing the table")
    options = parser.parse_args()
    parts = {"all": []} if options.all else {name: PARTS[name] for name in options.parts}
    codes, results = [], {}
    for version in options.versions:
        python = environment(version, options.base.resolve())
        for part, arguments in parts.items():
            print(f"transformers {version}, {part}", flush=True)  # noqa: T201
            code, counts = run(python, arguments)
            codes.append(code)
            results.setdefault(version, {})[part] = counts
    if not options.all:
        write(results)
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
