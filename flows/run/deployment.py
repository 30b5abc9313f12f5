"""The flow that Prefect's workers run: a recipe, as `edgepress run` runs it, in the worker's flow run. Imports Prefect.

A retry, from Prefect's UI or automatic, is the same flow run again: it resumes the run of the earlier attempt from its journal.
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
from flows.planning import find_recipe, load_recipe, make_plan, select
from flows.report import render_report
from flows.run.pipeline import EventHandler, run_pipeline
from flows.run.resuming import replan
from tasks.measurement.figures import measured
from tasks.store.journal import Run, latest_attempt, read_runs
from tasks.store.owner import owner_tag
from tasks.store.store import Store

FLOW = "edgepress"


@flow(name=FLOW, persist_result=False, log_prints=False)
def run_recipe(
    recipe: str,
    overrides: list[str] = [],  # noqa: B006  (Prefect's form shows a list for it, and nothing changes the default)
    only: list[str] = [],  # noqa: B006
    first: list[str] = [],  # noqa: B006  (`--from`; deployments know it by this name)
    force: list[str] = [],  # noqa: B006
    directory: str = "",
    store: str = ".edgepress",
    outputs: str = "outputs",
) -> Any:
    """Compress a language model by a recipe. Results in the store are not computed again.

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
    _ignore_ctrl_c()
    _tag_owner(context.flow_run)
    try:
        if directory:
            if not Path(directory).is_dir():
                raise EdgepressError(f"{os.uname().nodename} has no directory {directory}, where relative paths start")
            os.chdir(directory)
        opened = Store(Path(store))
        earlier = _earlier_attempt(opened, context.flow_run.id, logger.info)
        if earlier is None:
            plan = make_plan(load_recipe(find_recipe(Path(recipe)), tuple(overrides)), opened)
            plan, folder = select(plan, only=only, start_from=first, force=force), Path(outputs)
        elif earlier.state == "Completed":
            return Completed(name="Cached", message=f"{earlier.run} completed already; a new run would see what has changed since")
        else:
            plan, folder = replan(opened, earlier, logger.info), Path(earlier.outputs)
        outcome = run_pipeline(plan, opened, folder, _log_events(logger), render_report, earlier, context.flow_run.id)
    except EdgepressError as error:
        return Failed(message=str(error))
    folder = folder.absolute() / plan.parsed.recipe.name
    table = summary_markdown(outcome.summary, folder)
    create_markdown_artifact(table, key=_artifact_key(plan.parsed.recipe.name), description=outcome.run)
    return outcome.state


def _ignore_ctrl_c() -> None:
    """The runner ends this process by SIGTERM; a Ctrl-C in the terminal of `edgepress serve` would arrive first and disturb that."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _tag_owner(flow_run: FlowRun) -> None:
    """Tag the flow run with its process and attempt, so that it can be marked as crashed where its worker died too."""
    kept = [tag for tag in flow_run.tags if not tag.startswith(("owner:", "attempt:"))]
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, tags=[*kept, "edgepress", f"owner:{owner_tag()}", f"attempt:{flow_run.run_count}"])


def _earlier_attempt(store: Store, flow_run: UUID, notify: Callable[[str], None]) -> Run | None:
    """The run of an earlier attempt, which this one resumes; None where no attempt got as far as a run. Raises EdgepressError while it runs."""
    runs = [run for run in read_runs(store) if run.flow_run == str(flow_run)]
    if not runs:
        return None
    run = latest_attempt(store, runs[-1], notify)
    if run.state == "Running":
        raise EdgepressError(f"{run.run}, which this would resume, is still running ({run.owner})")
    notify(f"resuming {run.run} ({run.state.lower()})")
    return run


def _log_events(logger: "logging.Logger | logging.LoggerAdapter[Any]") -> EventHandler:
    """Write warnings and ends of stages to Prefect's log."""

    def on_event(stage: str, event: dict[str, Any]) -> None:
        if "warning" in event:
            logger.warning("%s: %s", stage, event["warning"])
        elif "ended" in event:
            logger.info("%s: %s", stage, event["ended"].lower())

    return on_event


def summary_markdown(summary: dict[str, Any], folder: Path) -> str:
    """Render a run's table in Markdown, with the folder of its results."""
    rows: list[dict[str, Any]] = summary["rows"]
    figures = measured(row["metrics"] for row in rows)
    lines = [f"# {summary['name']}", "", f"Results and report: `{folder}` · MLflow run: `{summary['run']}`", ""]
    lines.append("| stage | " + " | ".join(figure.heading for figure in figures) + " | state |")
    lines.append("| --- |" + " ---: |" * len(figures) + " --- |")
    for row in rows:
        values = [figure.text(row["metrics"]) for figure in figures]
        reason = f": {row['reason']}" if row["reason"] else ""
        lines.append(f"| {row['stage']} | {' | '.join(values)} | {row['state'].lower()}{_cell(reason)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _artifact_key(recipe: str) -> str:
    """A recipe's name as an artifact's key: lower-case letters, digits and dashes."""
    return "edgepress-" + "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in recipe)
