"""Run the stages of a plan in a Prefect flow run. Functions import Prefect after its server was started."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from compression.redaction import redacted
from flows.planning import BASE, Plan
from tasks.run_context import RunContext
from tasks.store.journal import Run
from tasks.store.owner import is_dead, owner_tag

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State


def run_flow(context: RunContext, plan: Plan, run: Run, flow_run: UUID | None) -> "State[Any]":
    """Run all stages in a flow run and return the state it ends in.

    Args:
        context: What the stages share; their results are added to it.
        plan: The stages.
        run: The run in the journal, after which the flow run is named and tagged.
        flow_run: The flow run in which this is called; None: a new one.
    """
    from prefect import flow, tags
    from prefect.client.orchestration import get_client
    from prefect.logging.handlers import APILogHandler

    mark_orphans_crashed()
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


def mark_orphans_crashed() -> None:
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
