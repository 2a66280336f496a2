"""Results as JSON, which a run resumes from, and as a page."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from hfvlm.evaluation.bootstrap import interval
from hfvlm.writing import replaced
from learning.entries import Entry, Scores, entries

FOLDER = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = FOLDER / "generators" / "learning.json", FOLDER / "learning.md"
SEEDS = (0, 1)
BEGIN, END = "<!-- learning: begin -->", "<!-- learning: end -->"
Results = dict[str, dict[str, Any]]


def read(path: Path) -> Results:
    """Read the results of earlier runs, by entry and seed; of none, there are none.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it to begin again.") from error
    return found


def run(entry: Entry, seed: int, effort: float = 1.0) -> dict[str, Any]:
    """Train and test one entry -> its measures, and the CPU seconds that it took."""
    start = time.process_time()
    scores = entry.run(seed, effort)
    seconds = time.process_time() - start
    return {"seconds": round(seconds, 1), "measures": {name: measured(each) for name, each in scores.items()}}


def run_one(name: str, seed: int, start: float, minutes: float | None) -> dict[str, Any] | None:
    """Run an entry in a process of its own, unless so many minutes have passed since `start`, by `time.monotonic`."""
    if minutes is not None and time.monotonic() - start > 60 * minutes:
        return None
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    return run(entries()[name], seed)


def measured(scores: Scores) -> dict[str, Any]:
    """Compute a measure's means and their 95 % intervals by bootstrap over the test's examples.

    Raises:
        ValueError: model and baseline were tested on different numbers of examples.
    """
    if len(scores.seeing) != len(scores.blind):
        raise ValueError(f"{len(scores.seeing)} scores of the model, and {len(scores.blind)} of the baseline.")
    found: dict[str, Any] = {"examples": len(scores.seeing)}
    for name, values in scores._asdict().items():
        bounds = interval(lambda rows, values=values: float(values[rows].mean()), len(values))
        found[name] = {"mean": round(float(np.mean(values)), 4), "interval": [round(bound, 4) for bound in bounds]}
    return found


def keep(results: Results, path: Path) -> None:
    """Write the results, in place of the earlier file."""
    with replaced(path) as file:
        file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def write_page(results: Results, entries: dict[str, Entry], page: Path) -> None:
    """Put a table of the results between the page's marks, and the names of entries that were not run."""
    text = page.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    with replaced(page) as file:
        file.write_text(f"{text[:begin]}\n{table(results, entries)}\n{text[end:]}", encoding="utf-8")


def table(results: Results, entries: dict[str, Entry]) -> str:
    """Make the rows: a measure of an entry, with each seed's result, the baseline's, and what it took."""
    lines = [["architecture", "measure", "seed", "model", "blind", "examples", "CPU seconds"]]
    notes, absent = [], []
    for name, entry in entries.items():
        runs = results.get(name, {})
        if not runs:
            absent.append(name)
            continue
        notes.append(f"- **{name}** {entry.purpose}. Blind: {entry.blind}.")
        lines += [
            [name, measure, seed, shown(found["seeing"]), shown(found["blind"]), str(found["examples"]), seconds]
            for seed, run in sorted(runs.items())
            for measure, found in run["measures"].items()
            for seconds in [f"{run['seconds']:.0f}"]
        ]
    lines.insert(1, ["---"] * len(lines[0]))
    parts = ["\n".join(notes), "\n".join(f"| {' | '.join(line)} |" for line in lines)] if notes else []
    if absent:
        parts.append(f"Not run yet, and so without numbers: {', '.join(absent)}.")
    return "\n" + "\n\n".join(parts) + "\n"


def shown(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['mean']:.2f} ({low:.2f} to {high:.2f})"


def missing(results: Results, names: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """List what has no result yet: a seed of each entry, then the next of each."""
    return [(name, seed) for seed in seeds for name in names if str(seed) not in results.get(name, {})]
