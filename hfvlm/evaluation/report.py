"""What an evaluation found, as JSON and as a page that needs no other file."""

import base64
import html
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import hfvlm
from hfvlm.inference.pages import data_url, thumbnail
from hfvlm.media.sources import import_extra

JSON_NAME, PAGE_NAME = "report.json", "report.html"


@dataclass
class Result:
    """A number and, where it was drawn for, the interval of 95 % confidence around it."""

    metric: str
    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" ({self.low:.4f} to {self.high:.4f})"
        return f"{self.metric}: {self.value:.4f}{interval}"


@dataclass
class Mistake:
    """A row that went most wrong: a picture's path, and what to say of it."""

    path: str | None
    text: str


@dataclass
class Report:
    """An evaluation.

    Args:
        task: as "zero-shot".
        model: its folder.
        data: what it was evaluated on.
        rows: how many there were.
        protocol: everything that the numbers depend on.
        results: the numbers.
        plots: names and functions that draw on matplotlib axes.
        mistakes: the worst first.
        errors: what is wrong with the rows that were left out, by number.
    """

    task: str
    model: str
    data: str
    rows: int
    protocol: dict[str, Any]
    results: list[Result]
    plots: dict[str, Callable[[Any], None]] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        known = {"hfvlm": hfvlm.__version__, "task": self.task, "model": self.model, "data": self.data}
        return known | {
            "rows": self.rows,
            "protocol": self.protocol,
            "results": [asdict(result) for result in self.results],
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
        }

    def for_card(self) -> list[dict[str, Any]]:
        """The numbers as `hfvlm.hub.write_card` takes them."""
        protocol = ", ".join(f"{name} {value}" for name, value in self.protocol.items())
        shared = {"task": self.task, "dataset": Path(self.data).name, "protocol": f"{self.rows} rows; {protocol}"}
        return [shared | {"metric": result.metric, "value": round(result.value, 4)} for result in self.results]

    def write(self, folder: Path) -> None:
        """`report.json` and `report.html`."""
        (folder / JSON_NAME).write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        (folder / PAGE_NAME).write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        numbers = "".join(
            f"<tr><td>{html.escape(r.metric)}</td><td>{r.value:.4f}</td>"
            f"<td>{'' if r.low is None else f'{r.low:.4f} to {r.high:.4f}'}</td></tr>"
            for r in self.results
        )
        protocol = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
            for name, value in self.protocol.items()
        )
        plots = "".join(f'<img class="plot" src="{plot_url(draw)}" alt="{name}">' for name, draw in self.plots.items())
        mistakes = "".join(mistake_figure(mistake) for mistake in self.mistakes)
        title = html.escape(f"{Path(self.model).name}: {self.task} on {Path(self.data).name}")
        return PAGE.format(
            title=title, numbers=numbers, protocol=protocol, plots=plots, mistakes=mistakes, rows=self.rows
        )


def mistake_figure(mistake: Mistake) -> str:
    image = thumbnail(mistake.path)
    picture = f'<img src="{data_url(image)}" alt="">' if image else ""
    return f"<figure>{picture}<figcaption>{html.escape(mistake.text)}</figcaption></figure>"


def plot_url(draw: Callable[[Any], None]) -> str:
    """A plot as a picture within a page."""
    import_extra("matplotlib", "eval", "Reports")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def confusion_plot(counts: np.ndarray, labels: list[str], most: int = 30) -> Callable[[Any], None]:
    """Shares of each true class; names only where they can be read."""

    def draw(axes: Any) -> None:
        axes.imshow(counts / counts.sum(axis=1, keepdims=True).clip(1), vmin=0, vmax=1, cmap="Blues")
        axes.set(xlabel="predicted", ylabel="true")
        if len(labels) <= most:
            axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
            axes.set_yticks(range(len(labels)), labels, fontsize=7)

    return draw


def recall_plot(ranks: dict[str, np.ndarray]) -> Callable[[Any], None]:
    """Recall over k, for each direction."""

    def draw(axes: Any) -> None:
        for name, found in ranks.items():
            ks = np.arange(1, min(len(found), 50) + 1)
            axes.plot(ks, [(found < k).mean() for k in ks], label=name)
        axes.set(xlabel="k", ylabel="recall@k", ylim=(0, 1.02))
        axes.legend()

    return draw


def shots_plot(curve: dict[int, list[float]], zero_shot: float | None) -> Callable[[Any], None]:
    """Accuracy over the number of examples, beside what needs none."""

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
