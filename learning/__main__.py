"""Train small models of all architectures, or of those that are named, and write docs/learning.md.

python -m learning                 # all, two seeds each; what has results already is not run again
python -m learning clip --again    # one of them, again
python -m learning --page          # only the page, from docs/learning.json
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from learning.entries import entries
from learning.results import PAGE, RESULTS, SEEDS, keep, missing, read, run_one, write_page


def main(arguments: list[str] | None = None) -> int:
    known = entries()
    parser = argparse.ArgumentParser(
        prog="python -m learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--again", action="store_true", help="run what has results, too")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with a thread")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so many")
    parser.add_argument("--page", action="store_true", help="run nothing, and write the page")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, default=PAGE, help="the page")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no entry {', '.join(unknown)}; there are {', '.join(known)}.")
    names = options.names or list(known)
    failed = 0 if options.page else run_all(names, options)
    write_page(read(options.results), known, options.write)
    return min(failed, 1)


def run_all(names: list[str], options: argparse.Namespace) -> int:
    """Run entries in turn, in some processes, and store the results after each; return how many failed."""
    start, failed = time.monotonic(), 0
    every = [(name, seed) for seed in options.seeds for name in names]
    waiting = every if options.again else missing(read(options.results), names, options.seeds)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        left = {pool.submit(run_one, *each, start, options.minutes): each for each in waiting}
        for done in as_completed(left):
            name, seed = left[done]
            try:
                found = done.result()
            except Exception as error:
                sys.stderr.write(f"{name}, seed {seed}: {type(error).__name__}: {error}\n")
                failed += 1
                continue
            if found is not None:
                store(name, seed, found, options.results)
    return failed


def store(name: str, seed: int, found: dict[str, Any], path: Path) -> None:
    """Store the results of one run, and print them."""
    results = read(path)
    results.setdefault(name, {})[str(seed)] = found
    keep(results, path)
    for measure, each in found["measures"].items():
        values = f"{each['seeing']['mean']:.2f}, blind {each['blind']['mean']:.2f}"
        sys.stdout.write(f"{name}, seed {seed}, {found['seconds']:.0f} s: {values}: {measure}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
