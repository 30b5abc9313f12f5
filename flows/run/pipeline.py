"""Running a plan as a Prefect flow, from the first process to the summary. Prefect and MLflow are imported here, after the server was started."""

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
from flows.planning.graph import BASE
from flows.planning.plan import Plan, check_disk
from flows.run.prefect_server import prefect_server, reached_server
from flows.run.summary import summarize
from flows.run.tracked import close_interrupted, end_cells, end_parent, known_stages, leaves, open_cells, open_parent, series, settle
from tasks.planned_stage import Result
from tasks.run_context import RunContext, TrackedRuns
from tasks.runners.choice import open_executor
from tasks.runners.executor import Executor
from tasks.store.journal import Run, RunBase, RunStage, StageStatus, journal
from tasks.store.owner import is_dead, owner_tag
from tasks.store.store import Store, check_links, unpublish
from tasks.store.summaries import write_summary
from tasks.tracking.tracking import OpenRun, Tracking, whole_address

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

Progress = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class RunOutcome:
    """A finished pipeline: its name in the journal, its summary as written to `outputs/<recipe>/run.json`, and whether everything held.

    `state` is what its flow run ends in: Completed, which is named Cached where nothing had to be done, or Failed, with the reasons.
    """

    run: str
    summary: dict[str, Any]
    succeeded: bool
    state: "State[Any]"


def run_pipeline(
    plan: Plan, store: Store, outputs: Path, progress: Progress, render: Callable[[dict[str, Any]], str], resumes: Run | None = None,
    flow_run: UUID | None = None,
) -> RunOutcome:  # fmt: skip
    """Run every stage of the plan; `render` turns the summary into the report page. With `resumes` it goes on with that run, in MLflow too.

    `flow_run` is Prefect's flow run in which this is called; without one, a server is started where none is known, and a flow run made.
    Stages that do not depend on a failed one go on. On Ctrl-C the children are ended, the runs are closed, KeyboardInterrupt goes on.
    """
    check_disk(plan, store)
    recipe = plan.parsed.recipe
    check_links(outputs, recipe.name, [stage.name for stage in plan.stages if stage.definition is not None])
    started = time.time()

    def shown(stage: str, event: dict[str, Any]) -> None:
        progress(stage, {**event, "warning": redacted(event["warning"])} if "warning" in event else event)

    def warn(message: str) -> None:
        shown("MLflow", {"warning": message})

    with (
        _ready(plan, store, resumes, flow_run, warn) as (executor, tracking, blamed),
        journal(store, _described(plan, outputs, resumes, flow_run)) as journaled, blamed(),
    ):  # fmt: skip
        begun = _begun(tracking, resumes, shown) if resumes else None
        run_name = begun.name if begun and begun.name else journaled.run.run
        run = open_parent(tracking, plan, store, run_name, begun)
        journaled.update(tracking_uri=redacted(tracking.uri), tracking_run=run)

        known_runs, superseded = known_stages(plan, begun)
        heard: set[str] = set()

        def told(stage: str, event: dict[str, Any]) -> None:
            shown(stage, event)
            if "ended" in event or stage not in heard:
                heard.add(stage)
                with context.lock:  # until it is written, or an older state could come after a newer one
                    journaled.update_stages({name: StageStatus(r.state, r.reason, r.seconds) for name, r in context.results.items()})

        runs = TrackedRuns(
            run,
            run_name,
            open_cells(tracking, plan, run, run_name, begun),
            known_runs,
            superseded,
            series=series(plan),
            leaves=leaves(plan),
        )
        context = RunContext(
            name=recipe.name, store=store, executor=executor, tracking=tracking, runs=runs, data=recipe.data, machine=plan.machine,
            base=plan.base, outputs=outputs, documents={a.name: (a.identity, a.document) for a in plan.stages}, progress=told,
            evaluation=recipe.evaluation, remeasure=plan.remeasure,
        )  # fmt: skip
        finished = False
        try:
            state = _run_flow(context, plan, journaled.run, flow_run)
            finished = True
        finally:
            executor.close()
            withdraw_descendants(plan, context.results, outputs)
            for result in context.results.values():
                result.run = tracking.id_of(result.run)
            summary = summarize(context, plan, started, journaled.run.run)
            write_summary(store, journaled.run.run, summary)  # before anything is asked of MLflow
            files = _write(context, summary, render) if finished else []
            end_cells(context, summary, plan, finished)
            if finished:
                end_parent(context, summary, plan, files)
            else:
                close_interrupted(context, summary, plan)
            settle(tracking, store.root / "outbox", warn)
        succeeded = all(row["state"] in {"Completed", "Cached"} for row in summary["rows"])
        journaled.update_stages({row["stage"]: StageStatus(row["state"], row["reason"], row["seconds"]) for row in summary["rows"]})
        journaled.end("Completed" if succeeded else "Failed")
    return RunOutcome(journaled.run.run, summary, succeeded, state)


@contextmanager
def _ready(
    plan: Plan, store: Store, resumes: Run | None, flow_run: UUID | None, warn: Callable[[str], None]
) -> Iterator[tuple[Executor, Tracking, Callable[[], AbstractContextManager[None]]]]:
    """What a run works with: children, MLflow, and a block that blames Prefect's server where that died.

    All that must answer is asked here, before the run is in the journal. Raises EdgepressError for what does not: nothing was run then.
    """
    executor = open_executor(plan.parsed.recipe.execution, [store.root, plan.base.origin])
    given = flow_run is None and os.environ.get("PREFECT_API_URL")
    with prefect_server(store.root / "prefect") if flow_run is None else nullcontext(nullcontext) as blamed:
        try:
            if given:
                reached_server()
            executor.preload()
            tracking = Tracking(_address(resumes), store.root / "outbox", warn)
            tracking.flush_leftover()
            tracking.end_orphans()
            yield executor, tracking, blamed
        finally:
            executor.close()


def _address(resumes: Run | None) -> str | None:
    """The MLflow store to go on in; None: that of `tracking_uri`. Raises EdgepressError where it had a user or a password, which no journal keeps."""
    if resumes is None or not resumes.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    return whole_address(resumes.tracking_uri)


def withdraw_descendants(plan: Plan, results: Mapping[str, Result], outputs: Path) -> None:
    """Take back the links of all that earlier runs made of a stage that breaks its gates now, also of what this run leaves out."""
    broken = {name for name, result in results.items() if any(verdict.outcome == "FAIL" for verdict in result.verdicts)}
    for name, ancestors in plan.ancestors.items():
        if not broken.isdisjoint(ancestors):
            unpublish(outputs, plan.parsed.recipe.name, name)


def _described(plan: Plan, outputs: Path, resumes: Run | None, flow_run: UUID | None) -> Run:
    """What the run's journal begins with. That of a resumed one names its run in MLflow from the start: this one may end before it is open."""
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


def _begun(tracking: Tracking, resumes: Run, progress: Progress) -> OpenRun | None:
    """The runs in MLflow to go on with. Warns where they are gone."""
    begun = tracking.find_open_run(resumes.tracking_run) if resumes.tracking_run else None
    if begun is None and resumes.tracking_run:
        progress(
            resumes.run, {"warning": f"its run {resumes.tracking_run} is not in MLflow at {tracking.uri}; this one gets a new run there"}
        )
    return begun


def _run_flow(context: RunContext, plan: Plan, run: Run, flow_run: UUID | None) -> "State[Any]":
    """Run all stages in the flow run this is called in, or in one of its own. Returns the state it ends in."""
    from prefect import flow, tags
    from prefect.client.orchestration import get_client
    from prefect.logging.handlers import APILogHandler

    _end_orphans()
    marks = ["edgepress", f"owner:{owner_tag()}", *([f"resumes:{run.resumes}"] if run.resumes else [])]
    with tags(*marks):  # of the flow run and all its task runs, from the moment they exist
        if flow_run is not None:
            with get_client(sync_client=True) as client:
                client.update_flow_run(flow_run, name=run.run)
            return _run_stages(context, plan)
        _quiet_prefect(context.store.root / "prefect")

        @flow(name=context.name, flow_run_name=run.run, persist_result=False, log_prints=False)
        def compress() -> Any:
            return _run_stages(context, plan)

        try:
            state: Any = compress(return_state=True)  # Prefect's types do not know that it is no coroutine
            return state
        finally:
            APILogHandler().flush()  # before the server goes


def _run_stages(context: RunContext, plan: Plan) -> "State[Any]":
    """Submit every stage to Prefect, which starts each one as the graph allows, and wait for all. To be called in a flow run."""
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
        except BaseException:  # Ctrl-C: the runner's threads wait for the children, so these go first
            context.executor.close()
            raise
    if broken := [name for name, state in states.items() if not state.is_completed()]:
        reasons = [f"{name}: {context.results[name].reason}" for name in broken if name in context.results]  # others wait for these
        return Failed(message="; ".join(reasons) or f"not done: {', '.join(broken)}")
    if all(state.name == "Cached" for state in states.values()):
        return Completed(name="Cached", message="nothing changed: every stage came from the store")
    return Completed(message="all stages done")


def _wait(future: Any) -> Any:
    future.wait()
    return future.state


class _Redacted(logging.Formatter):
    """Keeps no password that an error of Prefect's quotes."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def _quiet_prefect(home: Path) -> None:
    """Prefect's console messages go to a file; its API keeps them too. To be called after `from prefect import flow`, which sets logging up."""
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
    """Mark flow runs and task runs whose process is dead as crashed."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.client.schemas.objects import FlowRun, State, StateType
    from prefect.states import Crashed

    def every(read: Callable[..., list[Any]], **asked: Any) -> list[Any]:  # Prefect gives no more than 200 at a time
        found: list[Any] = []
        while page := read(**asked, offset=len(found)):
            found += page
        return found

    def dead(run: Any) -> bool:
        return any(tag.startswith("owner:") and is_dead(tag.removeprefix("owner:")) for tag in run.tags)

    def orphaned(flow_run: FlowRun) -> bool:  # a deployment's that is retried names the owner of the attempt before, until it has begun
        began = flow_run.state_type is StateType.RUNNING and f"attempt:{flow_run.run_count}" in flow_run.tags
        return dead(flow_run) and (began or flow_run.deployment_id is None)

    running = {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}, "tags": {"all_": ["edgepress"]}}
    crashed: State[Any] = Crashed(message="its process was killed")
    with get_client(sync_client=True) as client:
        for task_run in filter(dead, every(client.read_task_runs, task_run_filter=TaskRunFilter.model_validate(running))):
            client.set_task_run_state(task_run.id, crashed, force=True)
        for flow_run in filter(orphaned, every(client.read_flow_runs, flow_run_filter=FlowRunFilter.model_validate(running))):
            client.set_flow_run_state(flow_run.id, crashed, force=True)


def _write(context: RunContext, summary: dict[str, Any], render: Callable[[dict[str, Any]], str]) -> list[Path]:
    """Write the summary and the report beside the results; returns the files."""
    folder = context.outputs / context.name
    write_json(folder / "run.json", summary)
    (folder / "report.html").write_text(render(summary))
    return [folder / "run.json", folder / "report.html"]
