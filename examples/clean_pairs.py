"""Measure what each procedure of `hfvlm data` is worth: a small model, trained on what it reads and on what it writes.

For each procedure a data set is generated, with what it is for. Models with the same start, the same steps and batches
of the same size learn from the set as it is and from the procedure's output; and, where it chooses rows, from as many
rows of the set by chance. They are CLIPs, and classify new images of all 48 kinds of scenes by their captions; 2 %
would be right by chance.

    python examples/clean_pairs.py --output clean-pairs           # all, with two seeds: some minutes each on a core
    python examples/clean_pairs.py --output clean-pairs --only filter --seeds 1
    python examples/clean_pairs.py --output clean-pairs --page docs/data.md

A trial that is there already is not repeated. `--page` writes the numbers and the reports into a page, between its
two marks.
"""

import argparse
import json
import logging
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from cleaning import capfilt, choosing

from hfvlm.evaluation.bootstrap import interval

SIDES = {"input": "what it reads", "sample": "as many rows of it", "output": "what it writes"}
BEGIN, END = "<!-- measured: examples/clean_pairs.py -->", "<!-- end -->"
TRIALS = choosing.TRIALS | {"capfilt": capfilt.TRIAL}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=list(TRIALS), nargs="*", default=list(TRIALS))
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args(arguments)
    logging.getLogger("hfvlm").setLevel(logging.ERROR)  # damaged images are there on purpose
    found = {name: [trial(name, seed, options) for seed in range(options.seeds)] for name in options.only}
    (options.output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    if options.page:
        write_page(options.page, found, options)
    return found


def trial(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the models of one procedure with one seed."""
    options.seed, folder = seed, options.output / f"{name}-{seed}-{options.rows}-{options.steps}"
    chosen, done = TRIALS[name], folder / "result.json"
    result = json.loads(done.read_text()) if done.exists() else {}
    rows, cleaned = folder / "rows", folder / "cleaned"
    if not result:
        if not rows.exists():
            chosen.write(rows, options)
        report = chosen.run(rows, cleaned, options)
        result = {"rows": report.rows, "written": report.written, "report": report.tables(), "seed": seed}
        result["measures"] = chosen.measure(rows, cleaned, options)
        print(f"{name}, seed {seed}: {report.written} rows written, {result['measures']}", flush=True)
    sides: dict[str, tuple[Path, int | None]] = {"input": (rows, None), "output": (cleaned / chosen.written, None)}
    if chosen.chooses:
        sides["sample"] = (rows, result["written"])
    for side, (data, count) in sides.items():
        if side not in result:
            result[side] = summary(chosen.right(data, options, count))
            done.write_text(json.dumps(result, indent=2) + "\n")
            print(f"{name}, seed {seed}, {SIDES[side]}: {result[side]['accuracy']:.3f}", flush=True)
    return result


def summary(scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the mean of the first score with its interval, and the means of the others."""
    (_, right), *others = scores.items()
    low, high = interval(lambda drawn: float(right[drawn].mean()), len(right))
    means = {name: float(values.mean()) for name, values in others}
    return {"accuracy": float(right.mean()), "low": low, "high": high, "others": means}


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return a row for each procedure and seed."""
    heads = ["procedure", "seed", "rows read", "rows written", *(f"trained on {side}" for side in SIDES.values())]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, results in found.items():
        for each in results:
            cells = [f"`{name}`", each["seed"], each["rows"], each["written"], *(shown(each.get(k)) for k in SIDES)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def shown(score: dict[str, float] | None) -> str:
    return "" if score is None else f"{score['accuracy']:.3f} ({score['low']:.3f} to {score['high']:.3f})"


def gains(found: dict[str, list[dict[str, Any]]], over: str) -> str:
    """Return the mean gain of each procedure over a side that it has."""
    means = {
        name: fmean(each["output"]["accuracy"] - each[over]["accuracy"] for each in results)
        for name, results in found.items()
        if over in results[0]
    }
    return ", ".join(f"`{name}` {gain:+.3f}" for name, gain in means.items())


def details(results: list[dict[str, Any]]) -> list[str]:
    """Return what else was measured, with a column for each seed."""
    rows: dict[str, list[float]] = {}
    for each in results:
        for name, value in each.get("measures", {}).items():
            rows.setdefault(name, []).append(value)
        for side, title in SIDES.items():
            for name, value in each.get(side, {}).get("others", {}).items():
                rows.setdefault(f"{name}, trained on {title}", []).append(value)
    if not rows:
        return []
    seeds = [f"seed {each['seed']}" for each in results]
    lines = [f"| share | {' | '.join(seeds)} |", "|---" * (len(seeds) + 1) + "|"]
    return ["", *lines, *(f"| {name} | {' | '.join(f'{v:.3f}' for v in values)} |" for name, values in rows.items())]


def write_page(page: Path, found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Write the numbers and the reports of the first seed between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [
        f"{options.rows} rows, {options.steps} steps of 48; accuracy on 480 new images of 48 kinds, with the interval",
        "of 95 % by bootstrap over images. Mean gains of the seeds over what is read: "
        + gains(found, "input")
        + "; over as many rows of it by chance: "
        + gains(found, "sample")
        + ".",
        "",
        table(found),
    ]
    for name, results in found.items():
        report = results[0]["report"].partition("\n## ")[0].replace("# ", "", 1)  # without the table of keys
        lines += ["", f"### The report of {name}", *details(results), "", "```text", report.rstrip(), "```"]
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
