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

from hfvlm.evaluation.bootstrap import interval, mean_interval, ratio
from hfvlm.evaluation.tables import HEAD, Table, protocol_table, table_row
from hfvlm.inference.pages import data_url, image_url, thumbnail
from hfvlm.media.sources import import_extra
from hfvlm.versions import __version__

JSON_NAME, PAGE_NAME = "report.json", "report.html"
MOST_ERRORS, MOST_MISTAKES = 100, 24


@dataclass
class Result:
    """A number and, where there is one, the interval of 95 % confidence around it, and the count of what it is of:
    rows, queries or questions."""

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def interval(self) -> str:
        return "" if self.low is None else f"{self.low:.4f} to {self.high:.4f}"

    @property
    def count(self) -> str:
        return "" if self.n is None else f"n = {self.n}"

    def __str__(self) -> str:
        count = f", {self.count}" if self.count else ""
        return f"{self.metric}: {self.value:.4f}" + (f" ({self.interval})" if self.interval else "") + count


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
        about: the model's class, precision and device, and the data's columns, counts and fingerprint.
        each: the values of single rows, by metric and row number, for `hfvlm.evaluation.comparison`; of a ratio of
            sums, as precision, a numerator and a denominator.
        tables: results arranged in tables.
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
    each: dict[str, dict[int, Any]] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)

    def add(self, metric: str, numbers: Sequence[int], values: np.ndarray) -> None:
        """Add a metric that has a value for each row: its mean with the interval around it, and the values.

        Args:
            metric: its name.
            numbers: `(N,)` row numbers; of a row that occurs several times, the mean of its values is stored.
            values: `(N,)`.
        """
        each = np.asarray(values, np.float64)
        low, high = mean_interval(each)
        self.results.append(Result(metric, float(each.mean()), low, high, len(each)))
        by_row: dict[int, list[float]] = {}
        for row, value in zip(numbers, each.tolist(), strict=True):
            by_row.setdefault(row, []).append(value)
        self.each[metric] = {row: round(fmean(own), 6) for row, own in by_row.items()}

    def add_ratio(self, metric: str, numbers: Sequence[int], tops: np.ndarray, bottoms: np.ndarray) -> None:
        """Add a metric that is a ratio of sums, as precision, with the interval of sets of whole rows.

        Args:
            metric: its name; its count is the sum of the denominators where these are 0 or 1, else of all values.
            numbers: `(N,)` row numbers; a row may occur several times, as for each of its questions.
            tops: `(N,)` numerators.
            bottoms: `(N,)` denominators.
        """
        rows, places = np.unique(np.asarray(numbers), return_inverse=True)
        columns = [np.bincount(places, np.asarray(x, np.float64), len(rows)) for x in (tops, bottoms)]
        sums = np.stack(columns, axis=1)
        low, high = interval(lambda drawn: ratio(sums[drawn]), len(rows))
        count = int(np.sum(bottoms)) if np.max(bottoms) <= 1 else len(tops)
        self.results.append(Result(metric, ratio(sums), low, high, count))
        self.each[metric] = dict(zip(rows.tolist(), sums.tolist(), strict=True))

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
            "tables": [asdict(table) for table in self.tables],
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
        numbers = (table_row(r.metric, f"{r.value:.4f}", r.interval, r.count) for r in self.results)
        return PAGE.format(
            title=html.escape(f"{Path(self.model).name}: {self.task} on {Path(self.data).name}"),
            tables="".join(table.html() for table in self.tables),
            numbers="".join(numbers),
            protocol=protocol_table(self.protocol, self.about, versions(), {"cannot be read": len(self.errors)}),
            plots="".join(f'<img class="plot" src="{plot_url(p)}" alt="{name}">' for name, p in self.plots.items()),
            mistakes="".join(mistake_figure(mistake) for mistake in self.mistakes),
            rows=self.rows,
        )


def versions() -> dict[str, str]:
    """Return the versions of Python and the libraries that the numbers depend on."""
    names = ("torch", "transformers", "numpy", "datasets")
    found = {name: version(name) for name in names if find_spec(name) is not None}
    return {"python": platform.python_version(), "hfvlm": __version__} | found


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


def matrix_plot(names: list[str], values: np.ndarray) -> Callable[[Any], None]:
    """Plot what each modality, a row, finds of each other one, a column; NaN where nothing was measured."""

    def draw(axes: Any) -> None:
        axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
        axes.set_xticks(range(len(names)), names, rotation=30)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="found", ylabel="query")

    return draw


PAGE = (
    HEAD
    + """
<h1>{title}</h1>
<p>{rows} rows; intervals of 95 % confidence by bootstrap.</p>
{tables}
<table>{numbers}</table>
{plots}
{protocol}
<h2>Worst mistakes</h2>
<main>{mistakes}</main>
"""
)
