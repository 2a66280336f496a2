"""What an evaluation found, as JSON and as a page that needs no other file."""

import html
import io
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from hfvlm.evaluation.bootstrap import interval
from hfvlm.inference.pages import data_url, image_url, thumbnail
from hfvlm.media.sources import import_extra
from hfvlm.versions import __version__

JSON_NAME, PAGE_NAME = "report.json", "report.html"
MOST_ERRORS, MOST_MISTAKES = 100, 24


@dataclass
class Result:
    """A number and, where there is one, the interval of 95 % confidence around it."""

    metric: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> str:
        return "" if self.low is None else f"{self.low:.4f} to {self.high:.4f}"

    def __str__(self) -> str:
        return f"{self.metric}: {self.value:.4f}" + (f" ({self.interval})" if self.interval else "")


@dataclass
class Mistake:
    """A row that went most wrong: the path of its media file, and a caption for it."""

    path: str | None
    text: str


@dataclass
class Report:
    """An evaluation.

    Args:
        task: as "zero-shot".
        model: its folder.
        data: the name of the data set.
        rows: how many were measured.
        protocol: everything that the numbers depend on.
        results: the numbers.
        plots: names and functions that draw on matplotlib axes.
        mistakes: the worst first.
        errors: what is wrong with the rows that were left out, by number.
        about: the model's class, precision and device, and the data's columns and counts.
        each: the values of single rows, by metric and row number, for `compare`.
    """

    task: str
    model: str
    data: str
    rows: int
    protocol: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    plots: dict[str, Callable[[Any], None]] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    each: dict[str, dict[int, float]] = field(default_factory=dict)

    def add(self, metric: str, numbers: Sequence[int], values: np.ndarray) -> None:
        """Add a metric that has a value for each row: its mean with the interval around it, and the values.

        Args:
            metric: its name.
            numbers: `(N,)` row numbers; of a row that occurs several times, the mean of its values is stored.
            values: `(N,)`.
        """
        each = np.asarray(values, np.float64)
        low, high = interval(lambda rows: float(each[rows].mean()), len(each))
        self.results.append(Result(metric, float(each.mean()), low, high))
        by_row: dict[int, list[float]] = {}
        for row, value in zip(numbers, each.tolist(), strict=True):
            by_row.setdefault(row, []).append(value)
        self.each[metric] = {row: round(fmean(own), 6) for row, own in by_row.items()}

    def as_json(self) -> dict[str, Any]:
        """Return the content of `report.json`."""
        known = {"hfvlm": __version__, "task": self.task, "model": self.model, "data": self.data}
        return known | {
            "versions": versions(),
            "about": self.about,
            "rows": self.rows,
            "unreadable": len(self.errors),
            "errors": {str(row): error for row, error in list(self.errors.items())[:MOST_ERRORS]},
            "each": {metric: {str(row): value for row, value in rows.items()} for metric, rows in self.each.items()},
            "protocol": self.protocol,
            "results": [asdict(result) for result in self.results],
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
        }

    def for_card(self) -> list[dict[str, Any]]:
        """Return the numbers in the form that `write_card` takes."""
        protocol = ", ".join(f"{name} {value}" for name, value in self.protocol.items())
        rows = f"{self.rows} rows" + (f" ({len(self.errors)} more cannot be read)" if self.errors else "")
        shared = {"task": self.task, "dataset": Path(self.data).name, "protocol": f"{rows}; {protocol}"}
        return [shared | {"metric": result.metric, "value": round(result.value, 4)} for result in self.results]

    def write(self, folder: Path) -> None:
        """Write `report.json` and `report.html`."""
        (folder / JSON_NAME).write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        (folder / PAGE_NAME).write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """Return the content of `report.html`."""
        protocol = self.protocol | self.about | versions() | {"cannot be read": len(self.errors)}
        return PAGE.format(
            title=html.escape(f"{Path(self.model).name}: {self.task} on {Path(self.data).name}"),
            numbers="".join(table_row(r.metric, f"{r.value:.4f}", r.interval) for r in self.results),
            protocol="".join(table_row(*item) for item in protocol.items()),
            plots="".join(f'<img class="plot" src="{plot_url(p)}" alt="{name}">' for name, p in self.plots.items()),
            mistakes="".join(mistake_figure(mistake) for mistake in self.mistakes),
            rows=self.rows,
        )


@dataclass
class Difference:
    """The gain of a metric from a first report to a second: over equal rows, with its interval of 95 % confidence."""

    metric: str
    first: float
    second: float
    low: float
    high: float
    rows: int

    @property
    def gain(self) -> float:
        return self.second - self.first

    def __str__(self) -> str:
        note = "" if self.low > 0 or self.high < 0 else ", not significant"
        gain = f"{self.gain:+.4f} ({self.low:+.4f} to {self.high:+.4f}{note})"
        return f"{self.metric}: {self.first:.4f} -> {self.second:.4f}, {gain}"


def compare(first: Report | str | Path, second: Report | str | Path) -> list[Difference]:
    """Compare two models on the same rows, by the metrics that have a value for each row.

    The intervals are of the paired differences, drawn with replacement, so that rows which are hard for both count for
    neither.

    Args:
        first: a report, its `report.json`, or the folder of it.
        second: likewise.

    Raises:
        ValueError: they are of different tasks or data, or have no rows or metrics in common.
        FileNotFoundError: there is no such report.
    """
    one, two = (read_report(report) for report in (first, second))
    for name in ("task", "data"):
        if one[name] != two[name]:
            raise ValueError(f"The reports are of another {name}, {one[name]} and {two[name]}: nothing to compare.")
    if any(one["about"].get(name) != two["about"].get(name) for name in ("split", "limit", "seed")):
        raise ValueError("The reports are of another split or limit of the data: nothing to compare.")
    found = []
    for metric in (name for name in one["each"] if name in two["each"]):
        a, b = one["each"][metric], two["each"][metric]
        rows = [row for row in a if row in b]
        if not rows:
            continue
        values = np.array([[a[row], b[row]] for row in rows], np.float64)
        gains = values[:, 1] - values[:, 0]
        low, high = interval(lambda drawn, gains=gains: float(gains[drawn].mean()), len(rows))  # type: ignore[misc]
        found.append(Difference(metric, float(values[:, 0].mean()), float(values[:, 1].mean()), low, high, len(rows)))
    if not found:
        raise ValueError("The reports have no metric of single rows in common: write both with this version.")
    return found


def read_report(report: Report | str | Path) -> dict[str, Any]:
    """Read a report, as it is written.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no report.
    """
    if isinstance(report, Report):
        return json.loads(json.dumps(report.as_json()))
    path = Path(report) / JSON_NAME if Path(report).is_dir() else Path(report)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such report.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}).") from error
    if not isinstance(content, dict) or not {"task", "data", "each", "about"} <= content.keys():
        raise ValueError(f"{path}: no report that can be compared; evaluate again with this version.")
    return content


def versions() -> dict[str, str]:
    """Return the versions of Python and the libraries that the numbers depend on."""
    names = ("torch", "transformers", "numpy", "datasets")
    found = {name: version(name) for name in names if find_spec(name) is not None}
    return {"python": platform.python_version(), "hfvlm": __version__} | found


def table_row(*cells: Any) -> str:
    """Return a row of an HTML table."""
    return f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in cells)}</tr>"


def mistake_figure(mistake: Mistake) -> str:
    """Return the HTML of a mistake, with its image if it has one."""
    image = thumbnail(mistake.path)
    shown = f'<img src="{image_url(image)}" alt="">' if image else ""
    return f"<figure>{shown}<figcaption>{html.escape(mistake.text)}</figcaption></figure>"


def plot_url(draw: Callable[[Any], None]) -> str:
    """Return a plot as an image within a page."""
    import_extra("matplotlib", "eval", "Reports")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return data_url(file, "png")


def confusion_plot(counts: np.ndarray, labels: list[str], most: int = 30) -> Callable[[Any], None]:
    """Plot the shares of each true class; with names only where they can be read."""

    def draw(axes: Any) -> None:
        axes.imshow(counts / counts.sum(axis=1, keepdims=True).clip(1), vmin=0, vmax=1, cmap="Blues")
        axes.set(xlabel="predicted", ylabel="true")
        if len(labels) <= most:
            axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
            axes.set_yticks(range(len(labels)), labels, fontsize=7)

    return draw


def recall_plot(ranks: dict[str, np.ndarray]) -> Callable[[Any], None]:
    """Plot recall over k, for each direction."""

    def draw(axes: Any) -> None:
        for name, found in ranks.items():
            ks = np.arange(1, min(len(found), 50) + 1)
            axes.plot(ks, [(found < k).mean() for k in ks], label=name)
        axes.set(xlabel="k", ylabel="recall@k", ylim=(0, 1.02))
        axes.legend()

    return draw


def shots_plot(curve: dict[int, list[float]], zero_shot: float | None) -> Callable[[Any], None]:
    """Plot accuracy over the number of examples, next to the zero-shot accuracy."""

    def draw(axes: Any) -> None:
        means = [float(np.mean(values)) for values in curve.values()]
        errors = [float(np.std(values)) for values in curve.values()]
        axes.errorbar(list(curve), means, yerr=errors, marker="o", label="linear probe")
        if zero_shot is not None:
            axes.axhline(zero_shot, linestyle="--", color="gray", label="zero-shot")
        axes.set(xscale="log", xlabel="examples of each class", ylabel="accuracy", ylim=(0, 1.02))
        axes.set_xticks(list(curve), [str(count) for count in curve])
        axes.legend()

    return draw


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 16px system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td {{ border-bottom: 1px solid #ddd; padding: .3rem 1rem .3rem 0; overflow-wrap: anywhere }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 1rem }}
figure {{ margin: 0 }}
figure img {{ width: 100% }}
figcaption {{ font-size: .8rem }}
.plot {{ max-width: 34rem; width: 100% }}
</style>
<h1>{title}</h1>
<p>{rows} rows; intervals of 95 % confidence by bootstrap.</p>
<table>{numbers}</table>
{plots}
<h2>Protocol</h2>
<table>{protocol}</table>
<h2>Worst mistakes</h2>
<main>{mistakes}</main>
"""
