"""Two models side by side, by their reports on the same rows."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hfvlm.evaluation.bootstrap import interval, ratio
from hfvlm.evaluation.report import JSON_NAME, PAGE_NAME, Report, versions
from hfvlm.evaluation.tables import HEAD, Table, protocol_table
from hfvlm.versions import __version__


@dataclass
class Difference:
    """The gain of a metric from a first report to a second, with its interval of 95 % confidence over equal rows; a
    metric without values of single rows has neither interval nor rows."""

    metric: str
    first: float
    second: float
    low: float | None = None
    high: float | None = None
    rows: int | None = None

    @property
    def gain(self) -> float:
        return self.second - self.first

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return "no interval"
        note = "" if self.low > 0 or self.high < 0 else ", not significant"
        return f"{self.low:+.4f} to {self.high:+.4f}{note}"

    def __str__(self) -> str:
        return f"{self.metric}: {self.first:.4f} -> {self.second:.4f}, {self.gain:+.4f} ({self.interval})"


@dataclass
class Comparison:
    """Two reports of one task on the same data.

    Args:
        first: as it is in `report.json`.
        second: likewise.
        differences: one for each metric that both have.
    """

    first: dict[str, Any]
    second: dict[str, Any]
    differences: list[Difference]

    @property
    def tables(self) -> list[Table]:
        """The metrics with the values of both models, the difference and the number of rows that it is of."""
        names = [Path(report["model"]).name for report in (self.first, self.second)]
        names = names if names[0] != names[1] else [report["model"] for report in (self.first, self.second)]
        rows = [
            [
                d.metric, f"{d.first:.4f}", f"{d.second:.4f}", f"{d.gain:+.4f}", d.interval,
                "" if d.rows is None else str(d.rows),
            ]
            for d in self.differences
        ]  # fmt: skip
        title = f"{self.first['task']} on {Path(self.first['data']).name}"
        heads = ["metric", *names, "difference", "95 % interval", "rows"]
        return [Table(title, heads, rows, [d.metric for d in self.differences])]

    def as_json(self) -> dict[str, Any]:
        """Return the content of `report.json`."""
        models = [self.first["model"], self.second["model"]]
        found = [asdict(each) | {"gain": each.gain} for each in self.differences]
        known = {"hfvlm": __version__, "task": self.first["task"], "data": self.first["data"], "models": models}
        return known | {"versions": versions(), "differences": found, "reports": [self.first, self.second]}

    def write(self, folder: Path) -> None:
        """Write `report.json` and `report.html`."""
        (folder / JSON_NAME).write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        (table,) = self.tables
        notes = "Paired intervals of 95 % confidence by bootstrap over the rows that both reports have."
        head = HEAD.format(title=html.escape(table.title))
        parts = [
            {"model": report["model"]} | report.get("protocol", {}) | report["about"] | report.get("versions", {})
            for report in (self.first, self.second)
        ]
        page = f"<p>{notes}</p>{table.html()}{protocol_table(*parts)}"
        (folder / PAGE_NAME).write_text(f"{head}\n{page}\n", encoding="utf-8")


def side_by_side(first: Report | str | Path, second: Report | str | Path) -> Comparison:
    """Put two models next to each other in every metric that both were measured by; see `compare`.

    Metrics that have no values of single rows, as BLEU, have no interval.
    """
    one, two = (read_report(report) for report in (first, second))
    paired = {difference.metric: difference for difference in compare_content(one, two)}
    values = [{result["metric"]: result["value"] for result in report["results"]} for report in (one, two)]
    shared = [metric for metric in values[0] if metric in values[1]]
    found = [paired.get(name, Difference(name, values[0][name], values[1][name])) for name in shared]
    return Comparison(one, two, found)


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
    found = compare_content(one, two)
    if not found:
        raise ValueError("The reports have no metric of single rows in common: write both with this version.")
    return found


def compare_content(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[Difference]:
    """Compare the contents of two reports; see `compare`."""
    check_same_rows(one, two)
    found = []
    for metric in (name for name in one["each"] if name in two["each"]):
        rows = [row for row in one["each"][metric] if row in two["each"][metric]]
        if not rows:
            continue
        a, b = (as_sums([report["each"][metric][row] for row in rows]) for report in (one, two))
        low, high = interval(lambda drawn, a=a, b=b: ratio(b[drawn]) - ratio(a[drawn]), len(rows))  # type: ignore[misc]
        found.append(Difference(metric, ratio(a), ratio(b), low, high, len(rows)))
    return found


def as_sums(values: Sequence[Any]) -> np.ndarray:
    """Return `(N, 2)`, numerators and denominators, of the values of rows; a plain number is divided by 1."""
    return np.array([value if isinstance(value, list) else [value, 1.0] for value in values], np.float64)


def check_same_rows(one: Mapping[str, Any], two: Mapping[str, Any]) -> None:
    """Refuse reports that are not of the same rows: of equal content where both have a fingerprint, else of one name.

    Raises:
        ValueError: they are of another task, split, limit or data.
    """
    if one["task"] != two["task"]:
        raise ValueError(f"The reports are of another task, {one['task']} and {two['task']}: nothing to compare.")
    if any(one["about"].get(name) != two["about"].get(name) for name in ("split", "limit", "seed")):
        raise ValueError("The reports are of another split or limit of the data: nothing to compare.")
    prints = [report["about"].get("fingerprint") for report in (one, two)]
    if all(prints) and prints[0] != prints[1]:
        raise ValueError(
            f"The reports are of another content of the data, {one['data']} ({prints[0][:15]}) and {two['data']} "
            f"({prints[1][:15]}): evaluate both models on the same files."
        )
    if not all(prints) and one["data"] != two["data"]:
        raise ValueError(f"The reports are of another data, {one['data']} and {two['data']}: nothing to compare.")


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


def is_report(path: str | Path) -> bool:
    """Check whether a path is a report's file, or a folder that has one and is no model's."""
    path = Path(path)
    model = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    return path.is_file() or (not model and (path / JSON_NAME).is_file())
