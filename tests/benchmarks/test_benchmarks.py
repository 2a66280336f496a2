"""The quickest of the benchmarks, and that they catch what is wrong or grows too fast."""

import json

import numpy as np
import pytest
from rich.console import Console

from benchmarks import report, search
from benchmarks.measuring import Growth, Row, Size, measure

QUICK = Size(quick=True)


def test_a_quick_workload():
    found = report.run({"search": search.rows}, QUICK, rounds=1)
    assert len(found["rows"]) == 4
    assert all(row["error"] == 0 and "ratios" not in row for row in found["rows"])
    Console(quiet=True).print(report.table(found["rows"]))


def test_what_differs_is_not_timed():
    row = Row("product", {"hfvlm": lambda: np.ones(3), "careful": lambda: np.array([1, 1, 1.1])})
    with pytest.raises(RuntimeError, match=r"product: hfvlm and careful differ by 9.1e-02"):
        measure(row, Size(), 1)


def test_texts_must_be_equal():
    row = Row("answers", {"hfvlm": lambda: ["a", "b"], "careful": lambda: ["a", "c"]})
    with pytest.raises(RuntimeError, match="answers: hfvlm and careful differ by inf"):
        measure(row, QUICK, 1)


def test_what_grows_too_fast_is_an_error():
    assert measure(Growth("rows", (2, 4, 8), lambda n: 3.0 * n, 1.05), QUICK, 1)["exponent"] == pytest.approx(1)
    with pytest.raises(RuntimeError, match=r"rows: grows with the power 2.00, not 1.05"):
        measure(Growth("rows", (2, 4, 8), lambda n: n**2, 1.05), QUICK, 1)


def test_a_report(tmp_path):
    pytest.importorskip("matplotlib", reason="comes with hfvlm[eval]")
    ways = {"hfvlm": lambda: np.arange(1000).sum(), "careful": lambda: sum(range(1000))}
    found = report.run({"sums": lambda size: iter([Row("sum", ways)])}, Size(), rounds=3)
    json.dumps(found)
    page = tmp_path / "performance.md"
    for _ in range(2):  # the second time it replaces what is there
        text = page.read_text() if page.exists() else f"before\n{report.BEGIN}\n{report.END}\nafter\n"
        page.write_text(text)
        report.write_page(found, page)
    lines = page.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert sum(line.startswith("| sums | sum |") for line in lines) == 1
    assert (tmp_path / "performance.png").is_file()
