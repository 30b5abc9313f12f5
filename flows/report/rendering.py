"""The one template environment of the pages, and the parts that sections share. Imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flows.report.charts import COLOURS, PALETTE

_STATES = {  # on light and on dark paper
    "Completed": ("#15803d", "#4ade80"), "Cached": ("#0e7490", "#38bdf8"), "Failed": ("#b91c1c", "#f87171"),
    "Skipped": ("#a16207", "#facc15"), "Stopped": ("#a16207", "#facc15"), "Running": ("#667085", "#98a2b3"),
}  # fmt: skip
_OUTCOMES = {"PASS": "Completed", "FAIL": "Failed", "INCONCLUSIVE": "Skipped"}


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, the change from another run after it, and a small line below (an interval)."""

    text: str
    css: str = ""
    small: str = ""
    change: str = ""
    change_css: str = ""
    span: int = 1


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("flows.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(palette=PALETTE, states=_STATES)
    return environment


def render(macro: str, *arguments: object) -> Markup:
    """Render a macro of templates/macros.html.j2. Jinja2 escapes every argument that is not Markup."""
    return Markup(getattr(_environment().get_template("macros.html.j2").module, macro)(*arguments))


def render_page(title: str, sections: Iterable[tuple[str, str]], head: str = "") -> str:
    """Render a page that needs no other file. A section, (heading, content), without content is left out."""
    return _environment().get_template("page.html.j2").render(title=title, head=head, sections=sections) + "\n"


def word_cells(texts: Iterable[object], css: str = "") -> list[Cell]:
    """Cells of text, aligned left."""
    return [Cell(str(text), f"words {css}".rstrip()) for text in texts]


def state_cell(state: str) -> Cell:
    return Cell(state.lower(), f"words {state_class(state)}")


def render_table(heads: Sequence[Cell], rows: Sequence[Sequence[Cell]], row_css: Mapping[int, str] | None = None) -> Markup:
    """Render a table; `row_css` has the class of a row by its number."""
    return render("table", heads, rows, row_css or {})


def render_plots(charts: Sequence[tuple[str, str, str]]) -> Markup:
    """Render charts next to each other, (caption, SVG, legend) each; empty without any."""
    return render("plots", charts) if charts else Markup()


def render_legend(series: Iterable[str]) -> Markup:
    """Render what the colours of a chart stand for; empty where there is one series, or more than there are colours."""
    names = list(dict.fromkeys(series))
    return render("legend", list(zip(COLOURS, names, strict=False))) if 1 < len(names) <= len(COLOURS) else Markup()


def folded(title: str, content: str, *, when: bool) -> str:
    """Put long content behind a line that opens it."""
    return render("folded", title, content) if when else content


def state_class(state: str) -> str:
    """Return the CSS class of a state's colour, or of a verdict's outcome."""
    return _OUTCOMES.get(state, state if state in _STATES else "Running")
