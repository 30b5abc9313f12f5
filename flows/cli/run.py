"""`edgepress runs` and `edgepress resume`: list the runs of a store, and resume one. Imports no torch."""

import json
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from compression.errors import EdgepressError
from flows.cli.options import DEFAULT_STORE, StoreFolder, open_store, terminal

if TYPE_CHECKING:
    from flows.planning import Plan
    from tasks.store.journal import Run
    from tasks.store.store import Store

_DONE = ("Completed", "Cached")
run_app = typer.Typer()


@run_app.command()
def runs(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run (demo-3), to see its stages.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="NAME", help="Only the runs of this recipe.")] = None,
    store: StoreFolder = DEFAULT_STORE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with all that is known.")] = False,
) -> None:
    """List the runs of this store and how they ended, the oldest first; or the stages of one.

    A killed run has the state Crashed: `edgepress resume` resumes it.

    Example: `edgepress runs demo-3`
    """
    from tasks.store.journal import read_run, read_runs, refresh

    opened = open_store(store)
    if run is not None:
        named = refresh(opened, read_run(opened, run))
        if as_json:
            print(json.dumps(named.model_dump(mode="json"), indent=2))
        else:
            _print_stages(named)
        return
    listed = [refresh(opened, each) for each in read_runs(opened) if recipe in (None, each.recipe)]
    if as_json:
        print(json.dumps({"runs": [each.model_dump(mode="json") for each in listed]}, indent=2))
        return
    table = Table("run", "started", "state", "stages", "duration", "recipe", "resumes", caption=f"{len(listed)} runs")
    for each in listed:
        done = sum(stage.state in _DONE for stage in each.stages)
        started = datetime.fromtimestamp(each.started).strftime("%Y-%m-%d %H:%M")
        table.add_row(each.run, started, each.state, f"{done}/{len(each.stages)}", _duration(each), escape(each.file), each.resumes or "")
    terminal().print(table)


@run_app.command()
def resume(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A run (demo-3). Default: the last incomplete one that no later, complete run replaced."),
    ] = None,
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Resume a run that was killed, interrupted or failed: with its recipe as it stood then, its overrides, directory and MLflow run.

    Example: `edgepress resume demo-3`
    """
    from flows.run import replan

    opened = open_store(store)
    resumed = _run_to_resume(opened, run)
    if resumed is None:
        return
    print(f"resuming {resumed.run} ({resumed.state.lower()}) of {resumed.file}")
    plan = replan(opened, resumed, lambda note: print(f"note: {note}"))
    execute_plan(plan, opened, Path(resumed.outputs), resumed)


def execute_plan(plan: "Plan", store: "Store", outputs: Path, resumes: "Run | None" = None) -> None:
    """Run a plan, show its progress and then its table. Exits with 1 where a stage failed."""
    from flows.cli.screen import Screen, print_summary
    from flows.report import render_report
    from flows.run import run_pipeline

    console = terminal()
    with Screen(console) as screen:
        outcome = run_pipeline(plan, store, outputs, screen.update, render_report, resumes)
    print_summary(console, outcome.summary)
    folder = outputs / plan.parsed.recipe.name
    console.print(f"results: {folder}/   report: {folder / 'report.html'}   MLflow: edgepress ui", markup=False)
    if not outcome.succeeded:
        raise typer.Exit(1)


def _run_to_resume(store: "Store", name: str | None) -> "Run | None":
    """The run to resume; None, with the reason printed, where nothing is to be done. Raises EdgepressError for a run that is still alive."""
    from tasks.store.journal import latest_attempt, read_run, read_runs, refresh, successors

    if name is None:
        known = [refresh(store, run) for run in read_runs(store)]
        later = successors(known)
        incomplete = [run for run in known if run.state != "Completed" and run.run not in later]
        stopped = [run for run in incomplete if run.state != "Running"]
        completed = [run for run in known if run.state == "Completed"]
        overtaken = {run.run: newer.run for run in stopped for newer in completed if _overtakes(newer, run)}
        if resumable := [run for run in stopped if run.run not in overtaken]:
            return resumable[-1]
        reasons = [f"{run.run} still running" for run in incomplete if run.state == "Running"]
        reasons += [f"{old} was overtaken by {new}; name it to resume it" for old, new in list(overtaken.items())[-1:]]
        print(f"nothing to do: {'; '.join(reasons) or 'no run in this store is incomplete'}")
        return None
    run = latest_attempt(store, read_run(store, name), print)
    if run.state == "Running":
        raise EdgepressError(f"{run.run} is still running ({run.owner}); wait for its end, or press Ctrl-C there")
    if run.state == "Completed":
        print(f"nothing to do: {run.run} completed")
        return None
    return run


def _overtakes(newer: "Run", older: "Run") -> bool:
    """Whether resuming the older run would replace newer results."""
    same = (newer.recipe, newer.outputs) == (older.recipe, older.outputs)
    return same and newer.sequence > older.sequence and newer.only in {(), older.only}


def _duration(run: "Run") -> str:
    """Seconds from start to end, or to now; empty for a killed run, whose end is unknown."""
    ended = time.time() if run.state == "Running" else run.ended
    return "" if ended is None else f"{ended - run.started:.0f} s"


def _print_stages(run: "Run") -> None:
    resumed = f", resumes {run.resumes}" if run.resumes else ""
    table = Table(title=f"{run.run}: {run.state.lower()}{resumed}", caption=escape(run.reason) or None)
    for heading in ("stage", "uses", "state", "seconds", "identity", "reason"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for stage in run.stages:
        seconds = f"{stage.seconds:.1f}" if stage.seconds else ""
        table.add_row(stage.name, stage.uses, stage.state, seconds, stage.identity[:12], escape(stage.reason))
    terminal().print(table)
