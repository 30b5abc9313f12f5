"""Terminal output: progress bars while stages run, tables at the end. Imports no torch."""

import threading
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from flows.planning import Plan, estimate
from flows.report.comparison import compare
from flows.report.run_comparison import RunComparison
from tasks.measurement.figures import measured
from tasks.store.store import Store

_JUDGEMENT_STYLE = {"better": "bold green", "worse": "bold red", "noise": "dim", "same": "dim", "unlike": "dim"}
_STATE_STYLE = {"Completed": "green", "Cached": "cyan", "Failed": "bold red", "Skipped": "yellow"}


class Screen:
    """Live progress of the stages: one line each, from the first event to the final state."""

    def __init__(self, console: Console):
        self.console = console
        self._lock = threading.Lock()
        self._lines: dict[str, TaskID] = {}
        self._bars = Progress(
            SpinnerColumn(finished_text="•"), TextColumn("{task.fields[stage]:<16}"), BarColumn(bar_width=24), TextColumn("{task.description}"),
            TimeElapsedColumn(), console=console, transient=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> "Screen":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, stage: str, event: dict[str, Any]) -> None:
        """Show an event of a stage, {"progress": [done, total, what]} or {"ended": state}, or {"warning": text} of any source. Thread-safe."""
        if "warning" in event:
            self.console.print(f"[yellow]warning[/] {stage}: {escape(event['warning'])}", highlight=False)
            return
        with self._lock:
            line = self._lines.get(stage)
            if line is None:
                line = self._lines[stage] = self._bars.add_task("starting", total=None, stage=stage)
            if "ended" in event:
                state = event["ended"]
                self._bars.update(line, total=1, completed=1, description=_state(state))
                if not self.console.is_terminal:
                    self.console.print(f"{stage}: {state.lower()}")
            else:
                done, total, what = event["progress"]
                self._bars.update(line, total=total, completed=done, description=what)


def results_table(summary: dict[str, Any]) -> Table:
    """Build the table of a finished run: the base first, each stage a row, only columns with a measurement."""
    rows = summary["rows"]
    figures = measured(row["metrics"] for row in rows)
    table = Table(title=f"{summary['name']}: {summary['seconds']:.0f} s")
    table.add_column("stage", no_wrap=True)
    table.add_column("runtime", no_wrap=True)
    for figure in figures:
        table.add_column(figure.heading, justify="right", no_wrap=True)
    table.add_column("s", justify="right")
    table.add_column("state", no_wrap=True)
    for row in rows:
        table.add_row(
            row["stage"],
            row["runtime"],
            *(figure.text(row["metrics"]) for figure in figures),
            f"{row['seconds']:.1f}",
            _state(row["state"]),
        )
    return table


def _state(state: str) -> str:
    return f"[{_STATE_STYLE.get(state, 'white')}]{state.lower()}[/]"


def sweep_table(summary: dict[str, Any]) -> Table:
    """Build the table of a sweep: a row for each result of each cell, the best of each metric marked."""
    comparison = compare(summary)
    figures, many_leaves = comparison.measured(), len(comparison.leaves) > 1
    table = Table(title=f"{summary['name']}: {len(summary['sweep']['cells'])} cells, the best marked *")
    for key in (*comparison.keys, *(["result"] if many_leaves else [])):
        table.add_column(key, no_wrap=True)
    for figure in figures:
        table.add_column(figure.heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for line in comparison.lines:
        texts = ((figure.text(line.row["metrics"]), figure.metric in line.best) for figure in figures)
        marked = [f"[bold green]*{text}[/]" if best else text for text, best in texts]
        table.add_row(*map(escape, line.values), *([line.leaf] if many_leaves else []), *marked, _state(line.row["state"]))
    return table


def print_wide(console: Console, table: Table, names: int) -> None:
    """Print a table; one too wide for the terminal in parts one below the other, each with the first `names` columns."""
    rows = [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]
    headings = [str(column.header) for column in table.columns]
    widths = [
        max(console.measure(Text.from_markup(str(cell))).maximum for cell in column) + 3 for column in zip(headings, *rows, strict=True)
    ]
    available = console.width - 1 - sum(widths[:names])
    parts = _pack_columns(widths[names:], available)
    while available > 0 and len(tighter := _pack_columns(widths[names:], available - 1)) == len(parts):  # same number, more even widths
        parts, available = tighter, available - 1
    for number, part in enumerate(parts):
        partial = Table(title=table.title if number == 0 else None, caption=table.caption if part is parts[-1] else None)
        columns = [*range(names), *(names + column for column in part)]
        for column in columns:
            partial.add_column(headings[column], justify=table.columns[column].justify, no_wrap=table.columns[column].no_wrap)
        for row, cells in zip(table.rows, rows, strict=True):
            partial.add_row(*(cells[column] for column in columns), end_section=row.end_section)
        console.print(partial)


def _pack_columns(widths: Sequence[int], available: int) -> list[list[int]]:
    """Split columns, in order, into as few parts as fit the available width; a part has at least one column."""
    parts: list[list[int]] = [[]]
    for column, width in enumerate(widths):
        if parts[-1] and sum(widths[other] for other in parts[-1]) + width > available:
            parts.append([])
        parts[-1].append(column)
    return parts


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Print a run's table, then warnings, gates that did not pass and failures, then the table of a sweep."""
    print_wide(console, results_table(summary), 1)
    for row in summary["rows"]:
        for warning in row["warnings"]:
            console.print(f"[yellow]warning[/] {row['stage']}: {escape(warning)}", highlight=False)
        for verdict in row["verdicts"]:
            if verdict["outcome"] != "PASS":
                colour = "bold red" if verdict["outcome"] == "FAIL" else "yellow"
                console.print(f"[{colour}]{verdict['outcome']}[/] {row['stage']}: {escape(verdict['message'])}", highlight=False)
        if row["state"] == "Failed":
            console.print(f"[bold red]failed[/] {row['stage']}: {escape(row['reason'])}", highlight=False)
    if summary["sweep"]:
        table = sweep_table(summary)
        print_wide(console, table, sum(column.justify == "left" for column in table.columns) - 1)


def print_comparison(console: Console, comparison: RunComparison) -> None:
    """Print what differs between runs, then a line for each stage and run; differences from the first run are better, worse, or noise."""
    if comparison.differences:
        settings = Table("", *comparison.names, title="what differs")
        for key, values in comparison.differences.items():
            settings.add_row(escape(key), *("" if value is None else escape(str(value)) for value in values))
        console.print(settings)
    else:
        console.print("nothing differs: the same recipe, model, machine and edgepress")
    table = Table(
        title=f"differences from {comparison.names[0]}",
        caption=f"without {comparison.left_out} stages that others follow" if comparison.left_out else None,
    )
    for heading in ("stage", "run", "state"):
        table.add_column(heading, no_wrap=True)
    for figure in comparison.figures:
        table.add_column(figure.heading, justify="right", no_wrap=True)
    for stage, rows in comparison.stages.items():
        for number, row in enumerate(rows):
            labels = ["" if number else escape(stage), comparison.names[number]]
            if row is None:
                table.add_row(*labels, "[dim]none[/]")
                continue
            cells = []
            for figure in comparison.figures:
                change = comparison.change(stage, number, figure)
                mark = f" [{_JUDGEMENT_STYLE[change.judgement]}]{change.marked}[/]" if change and change.text else ""
                cells.append(figure.text(row["metrics"]) + mark)
            table.add_row(*labels, _state(row["state"]), *cells)
        table.add_section()
    print_wide(console, table, 2)
    console.print(
        "[bold green]✓ better[/] · [bold red]✗ worse[/] · [dim]~ within the noise · ? measured with other data or settings, or on another machine[/]"
    )


def plan_table(plan: Plan, store: Store) -> Table:
    """Build the table of a plan: stages in order, which of them the store has, and their estimated needs."""
    table = Table(title=f"{plan.parsed.recipe.name}: {len(plan.stages) - 1} stages, estimates from shapes")
    for heading in ("stage", "uses", "needs", "identity", "state", "size", "memory", "disk"):
        table.add_column(heading, justify="right" if heading in {"size", "memory", "disk"} else "left")
    for stage in plan.stages:
        needed = estimate(stage, plan)
        state = "measured only" if stage.definition is None else "[cyan]in the store[/]" if store.has(stage.identity) else "to run"
        sizes = [f"{n / 1e6:,.1f} MB" for n in (needed.size, needed.memory, needed.disk)]
        table.add_row(
            stage.name,
            stage.definition.uses if stage.definition else "base",
            ", ".join(dict.fromkeys(stage.inputs.values())),
            stage.identity[:12],
            state,
            *sizes,
        )
    return table
