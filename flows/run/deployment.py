"""The flow that Prefect's workers run: a recipe, as `edgepress run` runs it, in the flow run the worker was given. Needs Prefect to be imported.

A retry, pressed in Prefect's UI or not, is the same flow run again: it goes on with the run of the attempt before, from its journal.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from compression.errors import EdgepressError
from flows.planning.plan import Plan, make_plan
from flows.planning.recipe import find_recipe, load_recipe
from flows.planning.selection import select
from flows.report import render_report
from flows.run.pipeline import Progress, run_pipeline
from flows.run.resuming import replan
from tasks.measurement.figures import measured
from tasks.store.journal import Run, latest_attempt, read_runs
from tasks.store.owner import owner_tag
from tasks.store.store import Store

FLOW = "edgepress"


@flow(name=FLOW, persist_result=False, log_prints=False)
def run_recipe(
    recipe: str,
    overrides: list[str] = [],  # noqa: B006  (Prefect's form shows a list then, and nobody changes it)
    only: list[str] = [],  # noqa: B006
    first: list[str] = [],  # noqa: B006
    force: list[str] = [],  # noqa: B006
    directory: str = "",
    store: str = ".edgepress",
    outputs: str = "outputs",
) -> Any:
    """Compress a language model as a recipe says. What is in the store already is not computed again.

    Args:
        recipe: A recipe file, or the name of a shipped recipe (demo).
        overrides: Values put over the recipe, one a line: stages.distilled.steps=100
        only: Run only these stages and those they need. Empty: all.
        first: Compute these stages, and what descends from them, even if the store has them.
        force: Compute only these stages even if the store has them.
        directory: Where relative paths start: the recipe, its model and data, the store, the outputs, mlflow.db. Empty: where the worker starts the run.
        store: Where results are kept by identity.
        outputs: Where results are linked by name.
    """
    context, logger = FlowRunContext.get(), get_run_logger()
    assert context is not None and context.flow_run is not None
    _take_signals()
    _claim(context.flow_run)
    try:
        if directory:
            if not Path(directory).is_dir():
                raise EdgepressError(f"there is no directory {directory} here, on {os.uname().nodename}: relative paths would start there")
            os.chdir(directory)
        opened = Store(Path(store))
        begun = _begun(opened, context.flow_run.id, logger.info)
        if begun is None:
            plan, folder = _plan(opened, recipe, overrides, only, first, force), Path(outputs)
        elif begun.state == "Completed":
            return Completed(name="Cached", message=f"{begun.run} completed already; a new run would see what has changed since")
        else:
            plan, folder = replan(opened, begun, logger.info), Path(begun.outputs)
        outcome = run_pipeline(plan, opened, folder, _progress(logger), render_report, begun, context.flow_run.id)
    except EdgepressError as error:
        return Failed(message=str(error))
    folder = folder.absolute() / plan.parsed.recipe.name
    create_markdown_artifact(summary_page(outcome.summary, folder), key=_key(plan.parsed.recipe.name), description=outcome.run)
    return outcome.state


def _plan(store: Store, recipe: str, overrides: list[str], only: list[str], first: list[str], force: list[str]) -> Plan:
    plan = make_plan(load_recipe(find_recipe(Path(recipe)), tuple(overrides)), store)
    return select(plan, only=only, start_from=first, force=force)


def _take_signals() -> None:
    """Whoever runs this ends it by SIGTERM. A Ctrl-C in the terminal of `edgepress serve` would reach it first, and disturb its end."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _claim(flow_run: FlowRun) -> None:
    """Say in the flow run's tags who runs it, in which attempt: one whose worker died too is found by that, and marked as crashed."""
    kept = [tag for tag in flow_run.tags if not tag.startswith(("owner:", "attempt:"))]
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, tags=[*kept, "edgepress", f"owner:{owner_tag()}", f"attempt:{flow_run.run_count}"])


def _begun(store: Store, flow_run: UUID, say: Callable[[str], None]) -> Run | None:
    """The run that an attempt before began and this one goes on with; None for the first attempt, or when none came so far.

    Raises EdgepressError where it lives still.
    """
    earlier = [run for run in read_runs(store) if run.flow_run == str(flow_run)]
    if not earlier:
        return None
    run = latest_attempt(store, earlier[-1], say)
    if run.state == "Running":
        raise EdgepressError(f"{run.run}, which this would go on with, is still running ({run.owner})")
    say(f"going on with {run.run} ({run.state.lower()})")
    return run


def _progress(logger: "logging.Logger | logging.LoggerAdapter[Any]") -> Progress:
    """What the screen shows of a run in a terminal, as lines in Prefect's log."""

    def told(stage: str, event: dict[str, Any]) -> None:
        if "warning" in event:
            logger.warning("%s: %s", stage, event["warning"])
        elif "ended" in event:
            logger.info("%s: %s", stage, event["ended"].lower())

    return told


def summary_page(summary: dict[str, Any], folder: Path) -> str:
    """The table of a run in Markdown, and where its results are."""
    rows: list[dict[str, Any]] = summary["rows"]
    shown = measured(row["metrics"] for row in rows)
    lines = [f"# {summary['name']}", "", f"Results and report: `{folder}` · MLflow run: `{summary['run']}`", ""]
    lines.append("| stage | " + " | ".join(figure.heading for figure in shown) + " | state |")
    lines.append("| --- |" + " ---: |" * len(shown) + " --- |")
    for row in rows:
        values = [figure.text(row["metrics"]) for figure in shown]
        reason = f": {row['reason']}" if row["reason"] else ""
        lines.append(f"| {row['stage']} | {' | '.join(values)} | {row['state'].lower()}{_cell(reason)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _key(recipe: str) -> str:
    """A recipe's name as a key of an artifact: small letters, digits and dashes."""
    return "edgepress-" + "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in recipe)
