"""Tables of a terminal."""

from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from flows.cli.screen import print_wide


def printed(table: Table, width: int, names: int) -> list[str]:
    out = StringIO()
    print_wide(Console(file=out, width=width), table, names)
    return out.getvalue().splitlines()


@pytest.fixture
def table() -> Table:
    made = Table(title="results", caption="the end")
    for heading in ("stage", *(f"figure {n}" for n in range(8))):
        made.add_column(heading, no_wrap=True)
    made.add_row("base", *(f"[bold]{n}.25[/]" for n in range(8)), end_section=True)
    made.add_row("quantized", *(f"{n}.5" for n in range(8)))
    return made


def test_a_table_that_fits_is_one(table: Table) -> None:
    out = StringIO()
    Console(file=out, width=120).print(table)
    assert printed(table, 120, 1) == out.getvalue().splitlines()


@pytest.mark.parametrize("width", [30, 47, 60, 90])
def test_a_wide_table_is_printed_in_parts(table: Table, width: int) -> None:
    lines = printed(table, width, 1)
    text = "\n".join(lines)
    assert "…" not in text and max(map(len, lines)) <= width
    assert all(text.count(f"figure {n}") == text.count(f"{n}.25") == text.count(f"{n}.5 ") == 1 for n in range(8))
    parts = sum("stage" in line for line in lines)
    assert text.count("quantized") == parts > 1
    assert text.count("results") == text.count("the end") == 1
