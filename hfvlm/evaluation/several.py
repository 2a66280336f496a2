"""One model on several data sets, in one table."""

import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hfvlm.evaluation.data import Data
from hfvlm.evaluation.report import JSON_NAME, PAGE_NAME, Report, Result, versions
from hfvlm.evaluation.robustness import Fit, Shift, measure_shift, read_baseline
from hfvlm.evaluation.tables import HEAD, Table, protocol_table
from hfvlm.evaluation.tasks import evaluate
from hfvlm.versions import __version__

# The task whose accuracies on several data sets are of one classifier, and their metric.
SHIFTED, ACCURACY = "zero-shot", "accuracy"


@dataclass
class Reports:
    """The reports of one model on several data sets.

    Args:
        reports: by the data sets' names, the original data first.
        shifts: of each further data set, how the accuracy differs from that on the first; of zero-shot classification.
    """

    reports: dict[str, Report]
    shifts: list[Shift] = field(default_factory=list)

    @property
    def first(self) -> Report:
        return next(iter(self.reports.values()))

    @property
    def tables(self) -> list[Table]:
        """The metrics of all data sets, and the shifts."""
        results = {name: {r.metric: r for r in report.results} for name, report in self.reports.items()}
        metrics = list(dict.fromkeys(metric for own in results.values() for metric in own))
        rows = [[metric, *(cell(own.get(metric)) for own in results.values())] for metric in metrics]
        title = f"{Path(self.first.model).name}: {self.first.task}"
        found = [Table(title, ["metric", *results], rows, metrics)]
        if self.shifts:
            rows = [[s.name, with_interval(s.drop), with_interval(s.robustness), str(s.models)] for s in self.shifts]
            heads = ["data", "drop", "effective robustness", "models of the baseline"]
            found.append(Table(f"accuracy, next to {next(iter(self.reports))}", heads, rows, []))
        return found

    def as_json(self) -> dict[str, Any]:
        """Return the content of `report.json`."""
        known = {"hfvlm": __version__, "task": self.first.task, "model": self.first.model, "versions": versions()}
        reports = {name: report.as_json() for name, report in self.reports.items()}
        return known | {"shifts": [asdict(shift) for shift in self.shifts], "reports": reports}

    def for_card(self) -> list[dict[str, Any]]:
        """Return the numbers in the form that `write_card` takes."""
        found = [each | {"dataset": name} for name, report in self.reports.items() for each in report.for_card()]
        for shift in self.shifts:
            if shift.robustness is not None:
                protocol = f"next to {next(iter(self.reports))}; baseline of {shift.models} models"
                value = round(shift.robustness[0], 4)
                row = {"task": self.first.task, "dataset": shift.name, "metric": "effective robustness"}
                found.append(row | {"value": value, "protocol": protocol})
        return found

    def write(self, folder: Path) -> None:
        """Write `report.json` and `report.html`."""
        (folder / JSON_NAME).write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        title = html.escape(self.tables[0].title)
        tables = "".join(table.html() for table in self.tables)
        parts = [
            {name: f"{report.data}, {report.rows} rows"} | report.protocol | report.about
            for name, report in self.reports.items()
        ]
        page = f"<h1>{title}</h1>{tables}{protocol_table(*parts, versions())}"
        (folder / PAGE_NAME).write_text(f"{HEAD.format(title=title)}\n{page}\n", encoding="utf-8")


def evaluate_several(
    task: str, folder: str | Path, data: Mapping[str, Data], *, baseline: str | Path | None = None, **options: Any
) -> Reports:
    """Run one task on several data sets.

    Args:
        task: one of `hfvlm.evaluation.tasks`.
        folder: the model's.
        data: by names; of zero-shot classification the first is the original data, of which the others are shifts.
        baseline: a CSV file with the accuracies of other models on these data sets, by their names: see
            `hfvlm.evaluation.robustness.read_baseline`. Without it the plain difference is measured, which says that
            a better model drops less, and not why.
        **options: of the task.

    Raises:
        ValueError: there are fewer than two data sets, or a baseline with another task than zero-shot.
    """
    names = list(data)
    if len(names) < 2:
        raise ValueError(f"Several data sets are needed, not {len(names)}.")
    if baseline is not None and task != SHIFTED:
        raise ValueError(f"A baseline goes with {SHIFTED}, one classifier of all data sets, not with {task}.")
    fits: dict[str, Fit] = {} if baseline is None else read_baseline(baseline, names[0], names[1:])
    found = Reports({name: evaluate(task, folder, own, **options) for name, own in data.items()})
    if task == SHIFTED:
        hits = {name: np.array(list(own.each[ACCURACY].values())) for name, own in found.reports.items()}
        found.shifts = [measure_shift(name, hits[names[0]], hits[name], fits.get(name)) for name in names[1:]]
    return found


def cell(result: Result | None) -> str:
    return "-" if result is None else f"{result.value:.4f}" + (f" ({result.n})" if result.n is not None else "")


def with_interval(value: tuple[float, float, float] | None) -> str:
    return "needs a baseline" if value is None else "{:+.4f} ({:+.4f} to {:+.4f})".format(*value)
