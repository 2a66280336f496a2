"""Test rows that were trained on, and what they change about accuracies (CLIP, https://arxiv.org/abs/2103.00020,
section 5): the accuracy on all rows, on the clean ones and on those that overlap, and how likely the last is if
overlap changes nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfvlm.checks.messages import listed
from hfvlm.data.store import Store
from hfvlm.evaluation.bootstrap import interval
from hfvlm.evaluation.comparison import read_report
from hfvlm.media.sources import import_extra
from hfvlm.writing import replaced

OVERLAP = "overlap.parquet"
METRIC = "accuracy"
# The paper's, of Clopper and Pearson.
CONFIDENCE = 0.995


def check_evaluations(evaluations: Mapping[str, str | Path], names: Sequence[str]) -> None:
    """Refuse evaluations that are of no test set, or that hold no accuracy of each row.

    Raises:
        ValueError: the message names it.
        FileNotFoundError: there is no such report.
    """
    for name, path in evaluations.items():
        if name not in names:
            raise ValueError(f"evaluation {name!r}: there is no test set of that name; there are {listed(names)}.")
        report = read_report(path)
        if METRIC not in report["each"]:
            raise ValueError(
                f"{path}: has no {METRIC} of single rows: evaluate with --task zero-shot or linear-probe."
            )
        if report["about"].get("limit") is not None:
            raise ValueError(f"{path}: is of a sample of the rows: evaluate without --limit.")


def write_overlap(store: Store, names: Sequence[str], output: Path) -> None:
    """Write a row for each pair of a test row and a training row that are the same."""
    import pyarrow
    from pyarrow import parquet

    found = [
        {"set": names[group - 1], "test_row": test, "row": row, "value": value}
        for group, test, row, value in store.run("SELECT grp, test, row, value FROM overlap")
    ]
    kinds = {"set": pyarrow.string(), "test_row": pyarrow.int64(), "row": pyarrow.int64(), "value": pyarrow.float64()}
    with replaced(output / OVERLAP) as file:
        parquet.write_table(pyarrow.Table.from_pylist(found, pyarrow.schema(list(kinds.items()))), file)


def overlap_tables(store: Store, names: Sequence[str], evaluations: Mapping[str, str | Path]) -> dict[str, Any]:
    """Return the tables of the report: how much of each test set was trained on, and accuracies."""
    sets, accuracies = [], []
    for group, name in enumerate(names, start=1):
        rows = store.one("SELECT count(*) FROM described WHERE grp = ?", group)
        copied = {test for (test,) in store.run("SELECT DISTINCT test FROM overlap WHERE grp = ?", group)}
        sets.append({"set": name, "rows": rows, "overlap": len(copied), "share": len(copied) / max(1, rows)})
        if name in evaluations:
            each = read_report(evaluations[name])["each"][METRIC]
            accuracies += compared(name, {int(row): float(value) for row, value in each.items()}, copied)
    return {"overlap with test sets": sets} | ({"accuracy on overlap and clean": accuracies} if accuracies else {})


def compared(name: str, each: Mapping[int, float], copied: set[int]) -> list[dict[str, Any]]:
    """Return the accuracies of one test set on all rows, the clean ones and those that overlap.

    Args:
        name: of the test set.
        each: by row, 1 for a right answer, else 0.
        copied: the rows that overlap.

    Returns:
        For each split its accuracy, with an interval: by bootstrap, 95 %; of overlap Clopper and Pearson's, 99.5 %,
        and `p`, the probability of as many right answers or more, if they come with the accuracy on clean rows.
    """
    splits = {
        "all": list(each.values()),
        "clean": [value for row, value in each.items() if row not in copied],
        "overlap": [value for row, value in each.items() if row in copied],
    }
    clean = sum(splits["clean"]) / len(splits["clean"]) if splits["clean"] else None
    found = []
    for split, values in splits.items():
        row: dict[str, Any] = {"set": name, "split": split, "rows": len(values), "accuracy": "", "interval": ""}
        row["p"] = ""
        if values:
            row["accuracy"] = sum(values) / len(values)
            low, high = exact(values)[:2] if split == "overlap" else bootstrapped(values)
            row["interval"] = f"{low:.4f} to {high:.4f}"
            if split == "overlap" and clean is not None:
                row["p"] = exact(values, clean)[2]
        found.append(row)
    return found


def bootstrapped(values: Sequence[float]) -> tuple[float, float]:
    """Return the interval of a mean by bootstrap."""
    return interval(lambda rows: sum(values[i] for i in rows) / len(rows), len(values))


def exact(values: Sequence[float], chance: float = 0.5) -> tuple[float, float, float]:
    """Return Clopper and Pearson's interval of a share, and the probability of as many right answers or more.

    Raises:
        ImportError: scipy is not installed.
    """
    binomtest = import_extra("scipy.stats", "eval", "Accuracies on overlap").binomtest
    test = binomtest(round(sum(values)), len(values), chance, alternative="greater")
    bounds = binomtest(round(sum(values)), len(values)).proportion_ci(CONFIDENCE, method="exact")
    return float(bounds.low), float(bounds.high), float(test.pvalue)
