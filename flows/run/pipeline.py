"""Run a plan as a Prefect flow, from the first process to the summary. Functions import Prefect and MLflow after the server was started."""

import logging
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
from flows.planning import BASE, Plan, check_disk
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
from flows.run.prefect_server import check_server, prefect_server
from flows.run.summary import summarize
from tasks.planned_stage import Result
from tasks.run_context import RunContext, TrackedRuns
from tasks.runners.choice import open_executor
from tasks.runners.executor import Executor
from tasks.store.journal import Run, RunBase, RunStage, StageStatus, journal
from tasks.store.owner import is_dead, owner_tag
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
            state = _run_flow(context, plan, journaled.run, flow_run)
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


def _run_flow(context: RunContext, plan: Plan, run: Run, flow_run: UUID | None) -> "State[Any]":
    """Run all stages in the given flow run, or in a new one. Returns the state it ends in."""
    from prefect import flow, tags
    from prefect.client.orchestration import get_client
    from prefect.logging.handlers import APILogHandler

    _end_orphans()
    run_tags = ["edgepress", f"owner:{owner_tag()}", *([f"resumes:{run.resumes}"] if run.resumes else [])]
    with tags(*run_tags):  # of the flow run and all its task runs, from the moment they exist
        if flow_run is not None:
            with get_client(sync_client=True) as client:
                client.update_flow_run(flow_run, name=run.run)
            return _run_stages(context, plan)
        _quiet_prefect(context.store.root / "prefect")

        @flow(name=context.name, flow_run_name=run.run, persist_result=False, log_prints=False)
        def compress() -> Any:
            return _run_stages(context, plan)

        try:
            state: Any = compress(return_state=True)  # Prefect's types take it for a coroutine
            return state
        finally:
            APILogHandler().flush()  # before the server stops


def _run_stages(context: RunContext, plan: Plan) -> "State[Any]":
    """Submit every stage to Prefect, which starts each one as the graph allows, and wait for all. Must be called in a flow run."""
    from prefect.futures import PrefectFuture
    from prefect.states import Completed, Failed
    from prefect.task_runners import ThreadPoolTaskRunner

    from tasks.task import stage_task

    futures: dict[str, PrefectFuture[Any]] = {}
    with ThreadPoolTaskRunner[Any](max_workers=32) as runner:
        try:
            for stage in plan.stages:
                needed = [futures[name] for name in dict.fromkeys(stage.inputs.values())]
                if stage.definition is not None and BASE not in stage.inputs.values():
                    needed.append(futures[BASE])  # every stage is compared with the base model
                futures[stage.name] = runner.submit(stage_task(context, stage), {}, wait_for=needed)
            states = {name: _wait(future) for name, future in futures.items()}
        except BaseException:  # Ctrl-C: the runner's threads wait for the children, so end these first
            context.executor.close()
            raise
    if broken := [name for name, state in states.items() if not state.is_completed()]:
        reasons = [f"{name}: {context.results[name].reason}" for name in broken if name in context.results]  # the others never started
        return Failed(message="; ".join(reasons) or f"not done: {', '.join(broken)}")
    if all(state.name == "Cached" for state in states.values()):
        return Completed(name="Cached", message="nothing changed: every stage came from the store")
    return Completed(message="all stages done")


def _wait(future: Any) -> Any:
    future.wait()
    return future.state


class _Redacted(logging.Formatter):
    """Mask passwords that an error of Prefect's quotes."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def _quiet_prefect(home: Path) -> None:
    """Send Prefect's console messages to a file; its API keeps them too. Must be called after `from prefect import flow`, which sets logging up."""
    from prefect.logging.handlers import PrefectConsoleHandler

    home.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(home / "prefect.log")
    file.setFormatter(_Redacted())
    for name in [None, *logging.root.manager.loggerDict]:
        logger = logging.getLogger(name)
        for console in [h for h in logger.handlers if isinstance(h, PrefectConsoleHandler)]:
            logger.removeHandler(console)
            logger.addHandler(file)


def _end_orphans() -> None:
    """Mark as crashed the flow runs and task runs whose process is dead."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.client.schemas.objects import FlowRun, State, StateType
    from prefect.states import Crashed

    def read_all(read: Callable[..., list[Any]], **filters: Any) -> list[Any]:  # Prefect returns at most 200 at a time
        runs: list[Any] = []
        while page := read(**filters, offset=len(runs)):
            runs += page
        return runs

    def dead(run: Any) -> bool:
        return any(tag.startswith("owner:") and is_dead(tag.removeprefix("owner:")) for tag in run.tags)

    def orphaned(flow_run: FlowRun) -> bool:  # a retry of a deployment's run has the tag of the earlier attempt's owner until it starts
        running_attempt = flow_run.state_type is StateType.RUNNING and f"attempt:{flow_run.run_count}" in flow_run.tags
        return dead(flow_run) and (running_attempt or flow_run.deployment_id is None)

    running = {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}, "tags": {"all_": ["edgepress"]}}
    crashed: State[Any] = Crashed(message="its process was killed")
    with get_client(sync_client=True) as client:
        for task_run in filter(dead, read_all(client.read_task_runs, task_run_filter=TaskRunFilter.model_validate(running))):
            client.set_task_run_state(task_run.id, crashed, force=True)
        for flow_run in filter(orphaned, read_all(client.read_flow_runs, flow_run_filter=FlowRunFilter.model_validate(running))):
            client.set_flow_run_state(flow_run.id, crashed, force=True)


def _write_results(context: RunContext, summary: dict[str, Any], render: Callable[[dict[str, Any]], str]) -> list[Path]:
    """Write the summary and the report next to the results; return their paths."""
    folder = context.outputs / context.name
    write_json(folder / "run.json", summary)
    (folder / "report.html").write_text(render(summary))
    return [folder / "run.json", folder / "report.html"]
