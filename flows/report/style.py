"""How the pages look: one style for light and dark, and the frame around a body. Imports no torch."""

from html import escape

from flows.report.charts import PALETTE

_STATES = {  # on light and on dark paper
    "Completed": ("#15803d", "#4ade80"), "Cached": ("#0e7490", "#38bdf8"), "Failed": ("#b91c1c", "#f87171"),
    "Skipped": ("#a16207", "#facc15"), "Stopped": ("#a16207", "#facc15"), "Running": ("#667085", "#98a2b3"),
}  # fmt: skip


def _colours(column: int) -> str:
    palette = [f"--c{number}: {pair[column]};" for number, pair in enumerate(PALETTE)]
    return " ".join([*palette, *(f"--{state}: {pair[column]};" for state, pair in _STATES.items())])


_STYLE = (
    f":root {{ color-scheme: light dark; --ink: #1c2430; --dim: #667085; --line: #d5dae1; --paper: #fff; --card: #f6f7f9; --mark: #2563eb; "
    f"--bad: #fef2f2; {_colours(0)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e9ee; --dim: #98a2b3; --line: #384150; --paper: #12161c; --card: #1b212a; "
    f"--mark: #7aa7ff; --bad: #2a1a1c; {_colours(1)} }} }}\n"
    """
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 96rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin: 0 } h2 { margin: 2.2rem 0 .6rem; font-size: 1.15rem } h3 { margin: 1rem 0 .3rem; font-size: 1rem }
p { margin: .4rem 0 } .dim { color: var(--dim) } .scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums } th { font-weight: 600; color: var(--dim) }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: top }
td small { display: block; color: var(--dim); font-size: .75rem; line-height: 1.2 }
.scroll tr > :first-child { position: sticky; left: 0; background: var(--paper) } .scroll tr.base > :first-child { background: var(--card) }
.words { text-align: left } .wrap { white-space: normal; min-width: 18rem } tr.base { background: var(--card) } tr.first td { border-top: 2px solid var(--line) }
svg { display: block; width: 100%; height: auto }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink) } svg .dim { fill: var(--dim) } svg .strong { font-weight: 600 }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem }
.plots > figure { flex: 1 1 26rem; max-width: 38rem; margin: 0; background: var(--card); border-radius: 8px; padding: .5rem }
figcaption { font-weight: 600; padding: .2rem .5rem }
.card { background: var(--card); border-radius: 8px; padding: .5rem } .alert { background: var(--bad); border-left: 4px solid var(--Failed) }
.note { background: var(--card); border-left: 4px solid var(--Skipped) } .alert, .note { border-radius: 4px; padding: .5rem 1rem; margin: .8rem 0 }
.alert ul, .note ul { margin: .2rem 0; padding-left: 1.2rem } li { margin: .3rem 0; overflow-wrap: anywhere }
.best, .better { color: var(--Completed); font-weight: 700 } .worse { color: var(--Failed) }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .8rem }
.samples > div { background: var(--card); border-radius: 8px; padding: .5rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere }
summary { cursor: pointer; color: var(--dim); margin: .4rem 0 }
""" + "".join(f".{state} {{ color: var(--{state}) }} svg .{state} {{ stroke: var(--{state}) }}\n" for state in _STATES)
)


def whole_page(title: str, body: str) -> str:
    """A page that needs nothing beside itself."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)} · edgepress</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def plots(charts: list[tuple[str, str, str]]) -> str:
    """Charts side by side, (caption, SVG, legend as HTML) each; empty without any."""
    figures = "".join(
        f"<figure>{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}{svg}{legend}</figure>"
        for caption, svg, legend in charts
    )
    return f'<div class="plots">{figures}</div>' if charts else ""


def folded(title: str, content: str, *, when: bool) -> str:
    """Content behind a line that opens it, where it is much."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if when else content


def state_class(state: str) -> str:
    """The class of a state's colour, or of a verdict's outcome."""
    return {"PASS": "Completed", "FAIL": "Failed", "INCONCLUSIVE": "Skipped"}.get(state, state if state in _STATES else "Running")
