"""Run a plan from the first process to the summary: services, journal, stages, MLflow, results. Imports neither Prefect nor MLflow."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from compression.files import write_json
from compression.redaction import redacted
from flows.planning import Plan, check_disk
from flows.run.mlflow_runs import (
    close_interrupted,
    close_tracking,
    end_cells,
    end_parent,
    known_stages,
    leaves,
    open_cells,
    open_parent,
    series,
)
from flows.run.prefect_flow import run_flow
from flows.run.prefect_server import check_server, prefect_server
from flows.run.summary import summarize
from tasks.planned_stage import Result
from tasks.run_context import RunContext, TrackedRuns
from tasks.runners.choice import open_executor
from tasks.runners.executor import Executor
from tasks.store.journal import Run, RunBase, RunStage, StageStatus, journal
from tasks.store.store import Store, check_links, unpublish
from tasks.store.summaries import write_summary
from tasks.tracking import OpenRun, Tracking, full_address

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

EventHandler = Callable[[str, dict[str, Any]], None]
"""Called with a stage, or a source of warnings, and {"progress": [done, total, what]}, {"ended": state} or {"warning": text}."""


@dataclass(frozen=True)
class RunOutcome:
    """A finished pipeline.

    run        its name in the journal
    summary    as written to `outputs/<recipe>/run.json`
    succeeded  every stage completed or came from the store
    state      the state its flow run ends in: Completed, which is named Cached where nothing had to be done, or Failed, with the reasons
    """

    run: str
    summary: dict[str, Any]
    succeeded: bool
    state: "State[Any]"


def run_pipeline(
    plan: Plan,
    store: Store,
    outputs: Path,
    on_event: EventHandler,
    render: Callable[[dict[str, Any]], str],
    resumes: Run | None = None,
    flow_run: UUID | None = None,
) -> RunOutcome:
    """Run every stage of a plan as a Prefect flow, then write its summary and its report.

    A failed stage stops only the stages that depend on it. Ctrl-C ends the child processes and closes all runs before KeyboardInterrupt leaves.

    Args:
        plan: What to run.
        store: Where results are kept by identity.
        outputs: Where results are linked by name.
        on_event: Called from the stages' threads with their progress and their ends.
        render: Turns the summary into the report page.
        resumes: An earlier run to resume, in MLflow too.
        flow_run: Prefect's flow run in which this is called. Without one, this creates a flow run, on an embedded server where none is configured.

    Raises:
        EdgepressError: Something that the run needs is missing or does not answer; no stage was run then.
    """
    check_disk(plan, store)
    recipe = plan.parsed.recipe
    check_links(outputs, recipe.name, [stage.name for stage in plan.stages if stage.definition is not None])
    started = time.time()

    def emit(stage: str, event: dict[str, Any]) -> None:
        on_event(stage, {**event, "warning": redacted(event["warning"])} if "warning" in event else event)

    def warn(message: str) -> None:
        emit("MLflow", {"warning": message})

    with (
        _open_services(plan, store, resumes, flow_run, warn) as (executor, tracking, server_guard),
        journal(store, _journal_entry(plan, outputs, resumes, flow_run)) as journaled,
        server_guard(),
    ):
        open_run = _find_open_run(tracking, resumes, emit) if resumes else None
        run_name = open_run.name if open_run and open_run.name else journaled.run.run
        run = open_parent(tracking, plan, store, run_name, open_run)
        journaled.update(tracking_uri=redacted(tracking.uri), tracking_run=run)

        known_runs, superseded = known_stages(plan, open_run)
        recorded: set[str] = set()

        def record_event(stage: str, event: dict[str, Any]) -> None:
            emit(stage, event)
            if "ended" in event or stage not in recorded:
                recorded.add(stage)
                with context.lock:  # until the states are written: otherwise older ones could overwrite newer ones
                    journaled.update_stages({name: StageStatus(r.state, r.reason, r.seconds) for name, r in context.results.items()})

        runs = TrackedRuns(
            run,
            run_name,
            open_cells(tracking, plan, run, run_name, open_run),
            known_runs,
            superseded,
            series=series(plan),
            leaves=leaves(plan),
        )
        context = RunContext(
            name=recipe.name, store=store, executor=executor, tracking=tracking, runs=runs, data=recipe.data, machine=plan.machine,
            base=plan.base, outputs=outputs, documents={a.name: (a.identity, a.document) for a in plan.stages}, progress=record_event,
            evaluation=recipe.evaluation, remeasure=plan.remeasure,
        )  # fmt: skip
        finished = False
        try:
            state = run_flow(context, plan, journaled.run, flow_run)
            finished = True
        finally:
            executor.close()
            unpublish_descendants(plan, context.results, outputs)
            for result in context.results.values():
                result.run = tracking.id_of(result.run)
            summary = summarize(context, plan, started, journaled.run.run)
            write_summary(store, journaled.run.run, summary)  # before MLflow, which may fail
            files = _write_results(context, summary, render) if finished else []
            end_cells(context, summary, plan, finished)
            if finished:
                end_parent(context, summary, plan, files)
            else:
                close_interrupted(context, summary, plan)
            close_tracking(tracking, store.root / "outbox", warn)
        succeeded = all(row["state"] in {"Completed", "Cached"} for row in summary["rows"])
        journaled.update_stages({row["stage"]: StageStatus(row["state"], row["reason"], row["seconds"]) for row in summary["rows"]})
        journaled.end("Completed" if succeeded else "Failed")
    return RunOutcome(journaled.run.run, summary, succeeded, state)


@contextmanager
def _open_services(
    plan: Plan,
    store: Store,
    resumes: Run | None,
    flow_run: UUID | None,
    warn: Callable[[str], None],
) -> Iterator[tuple[Executor, Tracking, Callable[[], AbstractContextManager[None]]]]:
    """Open what a run works with: an executor, MLflow, and a guard that names the run's own Prefect server where it died.

    Everything that must answer is tried here, before the run is in the journal. Raises EdgepressError for what does not.
    """
    executor = open_executor(plan.parsed.recipe.execution, [store.root, plan.base.origin])
    configured = flow_run is None and os.environ.get("PREFECT_API_URL")
    with prefect_server(store.root / "prefect") if flow_run is None else nullcontext(nullcontext) as server_guard:
        try:
            if configured:
                check_server()
            executor.preload()
            tracking = Tracking(_tracking_address(resumes), store.root / "outbox", warn)
            tracking.flush_leftover()
            tracking.end_orphans()
            yield executor, tracking, server_guard
        finally:
            executor.close()


def _tracking_address(resumes: Run | None) -> str | None:
    """The MLflow store of the resumed run; None: the configured one. Raises EdgepressError where it had a password, which no journal keeps."""
    if resumes is None or not resumes.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    return full_address(resumes.tracking_uri)


def unpublish_descendants(plan: Plan, results: Mapping[str, Result], outputs: Path) -> None:
    """Remove the links of all results of earlier runs that descend from a stage which breaks its gates now, also of stages this run leaves out."""
    broken = {name for name, result in results.items() if any(verdict.outcome == "FAIL" for verdict in result.verdicts)}
    for name, ancestors in plan.ancestors.items():
        if not broken.isdisjoint(ancestors):
            unpublish(outputs, plan.parsed.recipe.name, name)


def _journal_entry(plan: Plan, outputs: Path, resumes: Run | None, flow_run: UUID | None) -> Run:
    """The run's first state in the journal. A resuming run names its run in MLflow from the start: it may end before that is open."""
    parsed, base = plan.parsed, plan.base
    file = parsed.source.file
    stages = [
        RunStage(name=stage.name, uses=stage.definition.uses, identity=stage.identity, inputs=dict(stage.inputs))
        for stage in plan.stages
        if stage.definition is not None
    ]
    return Run(
        recipe=parsed.recipe.name, file=str(file.absolute()), text=parsed.source.text, overrides=parsed.overrides, directory=str(Path.cwd()),
        outputs=str(outputs.absolute()), base=RunBase(source=base.source, identity=base.identity, content=base.content), stages=tuple(stages),
        only=plan.only, again=tuple(stage.name for stage in plan.stages if stage.recompute), resumes=resumes.run if resumes else None,
        tracking_uri=resumes.tracking_uri if resumes else "", tracking_run=resumes.tracking_run if resumes else "",
        flow_run=str(flow_run or ""),
    )  # fmt: skip


def _find_open_run(tracking: Tracking, resumes: Run, on_event: EventHandler) -> OpenRun | None:
    """The resumed run's runs in MLflow. Warns where they are gone."""
    open_run = tracking.find_open_run(resumes.tracking_run) if resumes.tracking_run else None
    if open_run is None and resumes.tracking_run:
        message = f"its run {resumes.tracking_run} is not in MLflow at {tracking.uri}; this one gets a new run there"
        on_event(resumes.run, {"warning": message})
    return open_run


def _write_results(context: RunContext, summary: dict[str, Any], render: Callable[[dict[str, Any]], str]) -> list[Path]:
    """Write the summary and the report next to the results; return their paths."""
    folder = context.outputs / context.name
    write_json(folder / "run.json", summary)
    (folder / "report.html").write_text(render(summary))
    return [folder / "run.json", folder / "report.html"]
