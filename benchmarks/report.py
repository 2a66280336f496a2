"""Running workloads, and their results as a table, JSON, a plot and a part of docs/performance.md."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measuring import Size, Workload, machine, measure

PEERS = ("transformers", "careful", "open_clip", "faiss")
OPTIONS = ("optimize", "onnxruntime", "openvino", "bfloat16", "int8", "bitsandbytes")
WIDTH = 190  # of the table, wherever it is printed
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def main(workloads: Mapping[str, Workload], about: str | None) -> None:
    """Run workloads from the command line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="assert equal results and growth, at small sizes; no times"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="write JSON here, and a plot next to it")
    parser.add_argument("--page", action="store_true", help="put the results into docs/performance.md")
    arguments = parser.parse_args()
    size = Size(quick=arguments.quick, device=arguments.device)
    report = run(workloads, size, arguments.rounds)
    Console(width=WIDTH).print(table(report["rows"]))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if any("ratios" in row for row in report["rows"]):
            plot(report["rows"], arguments.output.with_suffix(".png"))
    if arguments.page:
        write_page(report, PAGE)


def run(workloads: Mapping[str, Workload], size: Size, rounds: int) -> dict[str, Any]:
    rows = [
        {"workload": name} | measure(item, size, rounds)
        for name, workload in workloads.items()
        for item in workload(size)
    ]
    return {"rows": rows} if size.quick else {"machine": machine(size.device), "rows": rows}


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row: its name, error, score, seconds, ratios of each peer, gains of each option, memory,
    exponent."""
    found = [row["workload"], row["name"], f"{row['error']:.0e}" if "error" in row else ""]
    found.append(f"{row['scores']['hfvlm']:.1%}" if "scores" in row else "")
    found.append(f"{row['seconds']['hfvlm']:.3f}" if "seconds" in row else "")
    for peer in PEERS:
        ratio = row.get("ratios", {}).get(peer)
        found.append(f"{ratio['median']:.2f} ({ratio['least']:.2f}-{ratio['most']:.2f})" if ratio else "")
    for option in OPTIONS:
        gain, off = row.get("gains", {}).get(option), row.get("off", {}).get(option)
        share = row.get("scores", {}).get(option)
        told = [f"{share:.1%}" if share is not None else ""]
        told += [f"{gain['median']:.2f} ({gain['least']:.2f}-{gain['most']:.2f})" if gain else ""]
        told += [f"off {off:.0e}" if off is not None else ""]
        found.append(", ".join(filter(None, told)))
    peaks = row.get("peak_mib", {})
    found.append(" / ".join(f"{peaks[name]:.0f}" for name in ("hfvlm", *PEERS) if name in peaks))
    found.append(f"{row['exponent']:.2f}, at most {row['most']}" if "exponent" in row else "")
    return found


HEADINGS = (
    *("workload", "row", "error", "hfvlm", "hfvlm, s"),
    *(f"{peer}, ratio" for peer in PEERS),
    *(f"{option}, gain" for option in OPTIONS),
    *("peak MiB", "exponent"),
)


def filled(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the headings and every row's cells, without columns that no row fills."""
    lines = [cells(row) for row in rows]
    present = [i for i in range(len(HEADINGS)) if any(line[i] for line in lines)]
    return [[line[i] for i in present] for line in ([*HEADINGS], *lines)]


def table(rows: list[dict[str, Any]]) -> Table:
    headings, *lines = filled(rows)
    result = Table(*headings, box=None)
    for line in lines:
        result.add_row(*line)
    return result


def marks(name: str) -> tuple[str, str]:
    """Return what a page has before and after the results of a workload, or of all that have no place of their own."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def write_page(report: Mapping[str, Any], page: Path) -> None:
    """Put the results between the page's marks: those of a workload that has some there, those of the others between
    those of "benchmarks", with a plot next to the page."""
    text = page.read_text(encoding="utf-8")
    places: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        own = row["workload"] if marks(row["workload"])[0] in text else "benchmarks"
        places.setdefault(own, []).append(row)
    found = report.get("machine", {})
    about = [f"{name}: {value}" for name, value in found.items() if name != "gflops"]
    speeds = [f"{name} {speed:.0f}" for name, speed in found.get("gflops", {}).items()]
    heading = f"{'; '.join(about)}. Float32 products, GFLOP/s: {', '.join(speeds)}."
    for name, rows in places.items():
        headings, *lines = filled(rows)
        parts = [heading, "\n".join(f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *lines))]
        if name == "benchmarks":
            plot(rows, page.with_suffix(".png"))
            parts.insert(1, f"![Ratios of all rows]({page.with_suffix('.png').name})")
        begin, end = marks(name)
        before, rest = text.split(begin)
        _, after = rest.split(end)
        body = "\n\n".join(parts)
        text = f"{before}{begin}\n{body}\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios with their spread, a line a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if "ratios" in row][::-1]
    figure = Figure(figsize=(8, 1 + 0.22 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for peer, colour in zip(PEERS, ("tab:orange", "tab:blue", "tab:green", "tab:red"), strict=True):
        points = [(i, row["ratios"][peer]) for i, row in enumerate(rows) if peer in row["ratios"]]
        if points:
            places, found = zip(*points, strict=True)
            middle = [ratio["median"] for ratio in found]
            spread = [
                [ratio["median"] - ratio["least"] for ratio in found],
                [ratio["most"] - ratio["median"] for ratio in found],
            ]
            axes.errorbar(middle, places, xerr=spread, fmt=".", color=colour, label=peer)
    axes.axvline(1, color="grey", linewidth=0.5)
    axes.set_yticks(range(len(rows)), [f"{row['workload']}: {row['name']}" for row in rows], fontsize=6)
    axes.set(xscale="log", xlabel="times as long as hfvlm")
    if rows:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
