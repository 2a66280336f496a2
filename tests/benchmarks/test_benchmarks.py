"""The quickest of the benchmarks, and that they catch what is wrong or grows too fast."""

import json

import numpy as np
import pytest
from rich.console import Console

from benchmarks import engines, precision, report, search
from benchmarks.measuring import Growth, Options, Row, Size, measure

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
        text = page.read_text() if page.exists() else "\n".join(["before", *report.marks("benchmarks"), "after\n"])
        page.write_text(text)
        report.write_page(found, page)
    lines = page.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert sum(line.startswith("| sums | sum |") for line in lines) == 1
    assert (tmp_path / "performance.png").is_file()


def test_options_are_reported_with_their_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "machine", lambda device: {"threads": 1})
    near = {"hfvlm": lambda: np.ones(1000), "int8": lambda: np.full(1000, 1.25)}
    items = [Options("speed", near, tolerance=0.5), Options("mean", near, tolerance=0.5, score=lambda x: x.mean() / 2)]
    found = report.run({"precision": lambda size: iter(items)}, Size(), rounds=3)
    assert [row["off"] for row in found["rows"]] == [{"int8": 0.2}] * 2
    assert found["rows"][1]["scores"] == {"hfvlm": 0.5, "int8": 0.625}
    page = tmp_path / "performance.md"
    page.write_text("\n".join([*report.marks("benchmarks"), "between", *report.marks("precision"), ""]))
    report.write_page(found, page)
    before, after = page.read_text().split("between")
    assert before == "\n".join([*report.marks("benchmarks"), ""])
    assert "| precision | mean | 50.0% |  | 62.5%, off 2e-01 |" in after
    with pytest.raises(RuntimeError, match="speed: hfvlm and int8 differ by 2.0e-01"):
        measure(Options("speed", near, tolerance=0.1), QUICK, 1)


def test_lower_precision_is_near():
    pytest.importorskip("sklearn", reason="comes with hfvlm[eval]")
    pytest.importorskip("bitsandbytes", reason="comes with hfvlm[quantization]")
    found = {row["name"]: row for row in report.run({"precision": precision.rows}, QUICK, rounds=1)["rows"]}
    for row in found.values():
        assert all(0 < off < 0.2 for off in row["off"].values()), row
    for name, least in {"CLIP, handwriting among 8 digits": 0.8, "ImageBind, first of 24 events": 0.3}.items():
        scores = found[name]["scores"]
        assert scores["hfvlm"] > least
        assert all(abs(share - scores["hfvlm"]) < 0.1 for share in scores.values())


@pytest.mark.integration
def test_engines_compute_the_same():
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason="comes with hfvlm[onnx,openvino]")
    (row,) = report.run({"engines": engines.rows}, QUICK, rounds=1)["rows"]
    assert set(row["off"]) == {"optimize", "onnxruntime", "openvino"}
    assert max(row["off"].values()) < 1e-5
