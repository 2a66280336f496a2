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


def write(results: dict[str, dict[str, str]]) -> None:
    """Put the results' table into the documentation, in the place of the last one."""
    found = {version: [counts.get(part, "not run") for part in PARTS] for version, counts in results.items()}
    rows = [f"| {version} | {' | '.join(counts)} |" for version, counts in found.items()]
    table = [f"| transformers | {' | '.join(PARTS)} |", f"|{' --- |' * (len(PARTS) + 1)}", *rows]
    today = datetime.now(UTC).date().isoformat()
    block = f"{MARK.format('begin')}\nLast run on {today}, Python {sys.version.split()[0]}.\n\n" + "\n".join(table)
    text = TABLE.read_text()
    begin, end = (re.escape(MARK.format(word)) for word in ("begin", "end"))
    text = re.sub(f"{begin}.*?(?={end})", lambda _: f"{block}\n", text, flags=re.DOTALL)
    TABLE.write_text(text)


def main() -> None:
    from hfvlm.versions import TESTED

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
