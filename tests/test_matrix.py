from tests import matrix
from tests.support.paths import ROOT


def rows(page):
    return [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| 5")]


def test_a_run_of_some_versions_keeps_the_rows_of_the_others(tmp_path):
    page = tmp_path / "compatibility.md"
    begin, end = (matrix.MARK.format(word) for word in ("begin", "end"))
    kept = "| 5.23.0 | 2026-11-30, Python 3.12.1 | 3 passed | 4 passed | 5 passed | not run |"
    older = "| 5.9.0 | 2026-01-01, Python 3.11.7 | 1 passed | 1 passed | 1 passed | not run |"
    page.write_text(f"# Versions\n\n{begin}\n{older}\n{kept}\n| 5.4.0 | then | 1 failed | | | |\n{end}\n\nMore.\n")
    matrix.write({"5.12.0": {"goldens": "2 passed"}, "5.4.0": {"generation": "1 passed, 2 skipped"}}, page)
    first, second, third = rows(page)
    assert (first[0], first[2:]) == ("| 5.4.0", ["1 passed, 2 skipped", "not run", "not run", "not run |"])
    assert (second[0], second[2:]) == ("| 5.12.0", ["not run", "not run", "2 passed", "not run |"])
    assert " | ".join(third) == kept  # 5.9.0 is tested no more
    assert page.read_text().startswith(f"# Versions\n\n{begin}\n| transformers |")
    assert page.read_text().endswith(f"{end}\n\nMore.\n")


def test_the_table_has_a_row_for_each_tested_version():
    table = rows(ROOT / "docs" / "compatibility.md")
    assert tuple(row[0].removeprefix("| ") for row in table) == matrix.TESTED
    assert {len(row) for row in table} == {2 + len(matrix.PARTS)}
