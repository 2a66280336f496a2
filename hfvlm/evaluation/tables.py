"""Results in tables, for terminals and for pages that need no other file."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The beginning of a page; `{title}` is escaped by whoever formats it.
HEAD = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 16px system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th {{ text-align: left; font-weight: 600 }}
td, th {{ border-bottom: 1px solid #ddd; padding: .3rem 1rem .3rem 0; overflow-wrap: anywhere }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 1rem }}
figure {{ margin: 0 }}
figure img {{ width: 100% }}
figcaption {{ font-size: .8rem }}
.plot {{ max-width: 34rem; width: 100% }}
</style>"""


@dataclass(frozen=True)
class Table:
    """Cells in rows.

    Args:
        title: what the cells are.
        heads: of the columns.
        rows: a text for each column.
        metrics: the names of the results that are in it.
    """

    title: str
    heads: list[str]
    rows: list[list[str]]
    metrics: list[str]

    def html(self) -> str:
        """Return the table as a part of a page."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.heads)
        rows = "".join(table_row(*row) for row in self.rows)
        return f"<h2>{html.escape(self.title)}</h2><table><tr>{head}</tr>{rows}</table>"


def protocol_table(*parts: Mapping[str, Any]) -> str:
    """Return what numbers depend on as an HTML table."""
    rows = (table_row(name, value) for part in parts for name, value in part.items())
    return f"<h2>Protocol</h2><table>{''.join(rows)}</table>"


def table_row(*cells: Any) -> str:
    """Return a row of an HTML table."""
    return f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in cells)}</tr>"
