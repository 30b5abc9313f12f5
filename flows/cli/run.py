"""`edgepress runs` and `edgepress resume`: what ran in this store, and going on with it. Imports no torch."""

import json
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from compression.errors import EdgepressError
from flows.cli.options import DEFAULT_STORE, StoreFolder, open_store, terminal

if TYPE_CHECKING:
    from flows.planning.plan import Plan
    from tasks.store.journal import Run, RunStage
    from tasks.store.store import Store

DONE = ("Completed", "Cached")
run_app = typer.Typer()


@run_app.command()
def runs(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run (demo-3), to see its stages.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="NAME", help="Only the runs of this recipe.")] = None,
    store: StoreFolder = DEFAULT_STORE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with everything that is known.")] = False,
) -> None:
    """List the runs of this store and how they ended, the oldest first; or the stages of one.

    A run that was killed says Crashed: `edgepress resume` goes on with it.

    Example: `edgepress runs demo-3`
    """
    from tasks.store.journal import read_run, read_runs, refresh

    opened = open_store(store)
    if run is not None:
        one = refresh(opened, read_run(opened, run))
        if as_json:
            print(json.dumps(one.model_dump(mode="json"), indent=2))
        else:
            _show_stages(one)
        return
    found = [refresh(opened, one) for one in read_runs(opened) if recipe in (None, one.recipe)]
    if as_json:
        print(json.dumps({"runs": [one.model_dump(mode="json") for one in found]}, indent=2))
        return
    table = Table("run", "started", "state", "stages", "duration", "recipe", "resumes", caption=f"{len(found)} runs")
    for one in found:
        done = sum(stage.state in DONE for stage in one.stages)
        started = datetime.fromtimestamp(one.started).strftime("%Y-%m-%d %H:%M")
        table.add_row(one.run, started, one.state, f"{done}/{len(one.stages)}", _duration(one), escape(one.file), one.resumes or "")
    terminal().print(table)


@run_app.command()
def resume(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run (demo-3). Default: the last one that did not complete, nor was overtaken.")
    ] = None,
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Go on with a run that was killed, interrupted or failed: the same recipe as it stood then, overrides, directory, and run in MLflow.

    Example: `edgepress resume demo-3`
    """
    from flows.run.resuming import replan

    opened = open_store(store)
    wanted = _to_resume(opened, run)
    if wanted is None:
        return
    print(f"going on with {wanted.run} ({wanted.state.lower()}) of {wanted.file}")
    plan = replan(opened, wanted, lambda note: print(f"note: {note}"))
    execute_plan(plan, opened, Path(wanted.outputs), wanted)


def execute_plan(plan: "Plan", store: "Store", outputs: Path, resumes: "Run | None" = None) -> None:
    """Run a plan and show it: live, then as a table. Exits with 1 where a stage failed."""
    from flows.cli.screen import Screen, print_summary
    from flows.report import render_report
    from flows.run.pipeline import run_pipeline

    console = terminal()
    with Screen(console) as screen:
        outcome = run_pipeline(plan, store, outputs, screen.update, render_report, resumes)
    print_summary(console, outcome.summary)
    folder = outputs / plan.parsed.recipe.name
    console.print(f"results: {folder}/   report: {folder / 'report.html'}   MLflow: edgepress ui", markup=False)
    if not outcome.succeeded:
        raise typer.Exit(1)


def _to_resume(store: "Store", name: str | None) -> "Run | None":
    """The run to go on with, and its state now; None, and a word why, where there is nothing to do. Raises EdgepressError for one that is alive."""
    from tasks.store.journal import latest_attempt, read_run, read_runs, refresh, successors

    if name is None:
        known = [refresh(store, run) for run in read_runs(store)]
        later = successors(known)
        open_ends = [run for run in known if run.state != "Completed" and run.run not in later]
        stopped = [run for run in open_ends if run.state != "Running"]
        completed = [run for run in known if run.state == "Completed"]
        overtaken = {run.run: newer.run for run in stopped for newer in completed if _overtakes(newer, run)}
        if left := [run for run in stopped if run.run not in overtaken]:
            return left[-1]
        reasons = [f"{run.run} still running" for run in open_ends if run.state == "Running"]
        reasons += [f"{old} was overtaken by {new}; name it to go on with it" for old, new in list(overtaken.items())[-1:]]
        print(f"nothing to do: {'; '.join(reasons) or 'no run in this store is incomplete'}")
        return None
    run = latest_attempt(store, read_run(store, name), print)
    if run.state == "Running":
        raise EdgepressError(f"{run.run} is still running ({run.owner}); Ctrl-C there, or its end, comes first")
    if run.state == "Completed":
        print(f"nothing to do: {run.run} completed")
        return None
    return run


def _overtakes(newer: "Run", older: "Run") -> bool:
    """Whether going on with the older run would put its results in the place of newer ones."""
    same = (newer.recipe, newer.outputs) == (older.recipe, older.outputs)
    return same and newer.sequence > older.sequence and newer.only in {(), older.only}


def _duration(run: "Run") -> str:
    """From beginning to end, or to now; of a killed run nobody knows."""
    ended = time.time() if run.state == "Running" else run.ended
    return "" if ended is None else f"{ended - run.started:.0f} s"


def _show_stages(run: "Run") -> None:
    def row(stage: "RunStage") -> list[Any]:
        seconds = f"{stage.seconds:.1f}" if stage.seconds else ""
        return [stage.name, stage.uses, stage.state, seconds, stage.identity[:12], escape(stage.reason)]

    resumed = f", resumes {run.resumes}" if run.resumes else ""
    table = Table(title=f"{run.run}: {run.state.lower()}{resumed}", caption=escape(run.reason) or None)
    for heading in ("stage", "uses", "state", "seconds", "identity", "reason"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for stage in run.stages:
        table.add_row(*row(stage))
    terminal().print(table)
