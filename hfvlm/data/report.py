"""What a procedure kept and dropped, and why: as JSON and as tables."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hfvlm.checks.messages import cut
from hfvlm.versions import __version__
from hfvlm.writing import replaced

ROWS, DROPPED = "train", "dropped"
REPORT, TABLES = "report.json", "report.md"
EXAMPLES, LONGEST = 3, 80


@dataclass
class Report:
    """The result of a procedure.

    Args:
        procedure: its name.
        settings: all that the output depends on.
        rows: how many were decided about.
        kept: how many of them were kept.
        written: rows in the output.
        dropped: by the reason that decided, how many were dropped; they add up to rows - kept.
        broken: by rule, how many of the dropped rows break it; a row may break several.
        examples: by reason, a few of the rows.
        details: what else there is to report: numbers, and tables as lists of dictionaries.
    """

    procedure: str
    settings: dict[str, Any]
    rows: int = 0
    kept: int = 0
    written: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the content of `report.json`."""
        return {"hfvlm": __version__} | asdict(self)

    def write(self, folder: Path) -> None:
        """Write `report.md`, and `report.json`, which completes a run."""
        with replaced(folder / TABLES) as file:
            file.write_text(self.tables(), encoding="utf-8")
        with replaced(folder / REPORT) as file:
            file.write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")

    def tables(self) -> str:
        """Return the content of `report.md`."""
        share = f" ({self.kept / self.rows:.1%})" if self.rows else ""
        lines = [f"# {self.procedure}: {self.kept} of {self.rows} rows kept{share}", ""]
        if self.dropped:
            lines += table(
                ("dropped because", "rows", "share", "break this rule", "for example"),
                [
                    (reason, count, f"{count / self.rows:.1%}", self.broken.get(reason, 0),
                     "; ".join(self.examples.get(reason, [])[:1]))
                    for reason, count in self.dropped.items()
                ],
            )  # fmt: skip
        plain = {name: value for name, value in self.details.items() if not isinstance(value, list)}
        if plain:
            lines += table(("", "value"), plain.items())
        for name, rows in self.details.items():
            if isinstance(rows, list) and rows:
                lines += [f"## {name}", "", *table(list(rows[0]), [row.values() for row in rows])]
        return "\n".join(lines)


def table(heads: Sequence[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a Markdown table, aligned for reading as it is, and an empty one."""
    cells = [[cell(each) for each in row] for row in [heads, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(each.ljust(width) for each, width in zip(row, widths, strict=True))} |" for row in cells]
    return [lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:], ""]


def cell(value: Any) -> str:
    """Return a value for a cell: foreign text on one line, without bars."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return cut(" ".join(str(value).split()), LONGEST).replace("|", "/")


def summary(folder: Path, name: str, settings: Mapping[str, Any], details: dict[str, Any]) -> Report:
    """Return the report of what is in an output, file by file."""
    from pyarrow import parquet

    report = Report(name, dict(settings), details=details)
    first: Counter[str] = Counter()
    every: Counter[str] = Counter()
    for path in sorted(folder.glob(f"{DROPPED}-*.parquet")):
        for row in parquet.read_table(path).to_pylist():
            first[row["reasons"][0]] += 1
            every.update(set(row["reasons"]))
            known = report.examples.setdefault(row["reasons"][0], [])
            if len(known) < EXAMPLES:
                note = f" ({row['note']})" if row["note"] else ""
                known.append(cut(f"row {row['row']}: {row['text']!r}{note}", LONGEST * 2))
    report.written = sum(parquet.read_metadata(path).num_rows for path in folder.glob(f"{ROWS}-*.parquet"))
    report.kept = int(details.pop("kept", report.written))
    report.rows = report.kept + sum(first.values())
    report.dropped = dict(first.most_common())
    report.broken = dict(every.most_common())
    return report


def read_report(folder: str | Path) -> Report:
    """Read the report of an output.

    Raises:
        ValueError: it is damaged.
        FileNotFoundError: there is none.
    """
    path = Path(folder) / REPORT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is none: the run is not complete; start it again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("hfvlm")
        return Report(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error}): choose another output, or remove this one.") from error
