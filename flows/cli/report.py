"""`edgepress report` and `edgepress compare`: show any run of the store again, and runs side by side. Imports no torch."""

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compression.errors import EdgepressError
from flows.cli.options import DEFAULT_STORE, StoreFolder, open_store, terminal, write_page

if TYPE_CHECKING:
    from tasks.store.journal import Run
    from tasks.store.store import Store

report_app = typer.Typer()


@report_app.command()
def report(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run (demo-3). Default: the last one.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="File of the page. Default: RUN.html beside the run's results.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Print the tables and write no page.")] = False,
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Write the report of a run as one HTML page that works offline: graph, table, Pareto front, what each stage cost, training, samples.

    Example: `edgepress report demo-3 --open`
    """
    from flows.cli.screen import print_summary
    from flows.report import render_report
    from tasks.store.summaries import read_summary

    if text and (out or open_page):
        raise EdgepressError("--text writes no page: leave out --out and --open, or --text")
    opened = open_store(store)
    selected = _select_run(opened, run)
    summary = read_summary(opened, selected.run)
    if text:
        print_summary(terminal(), summary)
        return
    page = out or Path(selected.outputs) / selected.recipe / f"{selected.run}.html"
    write_page(page, render_report(summary))
    if open_page and not webbrowser.open(page.absolute().as_uri()):
        raise EdgepressError(f"no browser was found to open {page}")


@report_app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN RUN...", help="Two runs or more (demo-3 demo-5); all are compared with the first.")
    ],
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the comparison as an HTML page instead.")] = None,
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Show runs side by side: the settings that differ, and the results of every stage.

    Each difference has a mark: better, worse, within the noise of both measurements (~), or measured with other data, settings or machine (?).

    Example: `edgepress compare demo-3 demo-5`
    """
    from flows.cli.screen import print_comparison
    from flows.report.compare import render_comparison
    from flows.report.run_comparison import compare_runs
    from tasks.store.summaries import read_summary

    if len(set(runs)) < max(2, len(runs)):
        raise EdgepressError("name two different runs or more; `edgepress runs` lists them")
    opened = open_store(store)
    summaries = [read_summary(opened, run) for run in runs]
    comparison = compare_runs(summaries)
    if html is None:
        print_comparison(terminal(), comparison)
    else:
        write_page(html, render_comparison(comparison, summaries))


def _select_run(store: "Store", name: str | None) -> "Run":
    from tasks.store.journal import read_run, run_names

    names = run_names(store)
    if name is None and not names:
        raise EdgepressError(f"there is no run in {store.root} yet")
    return read_run(store, name or names[-1])
