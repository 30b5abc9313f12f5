"""The one Prefect task that runs any stage. Prefect caches nothing: the store does. Import it only where a flow runs."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import Task

from tasks.execution import RunContext, is_transient, run_stage
from tasks.planned_stage import PlannedStage


async def _retry_condition(_: Any, __: TaskRun, state: State[Any]) -> bool:
    """Retry a lost process, never a wrong recipe or a broken bound."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, BaseException) and is_transient(error)


def stage_task(context: RunContext, stage: PlannedStage) -> Task[[], State[Any]]:
    """The Prefect task of one stage, under the stage's own name."""

    @task(
        name=stage.definition.uses if stage.definition else "base", task_run_name=stage.name, cache_policy=NO_CACHE, persist_result=False,
        retries=stage.retries, retry_delay_seconds=1, retry_condition_fn=_retry_condition, tags=["edgepress"],
    )  # fmt: skip
    def run() -> State[Any]:
        result = run_stage(context, stage)
        manifest = {"stage": result.name, "identity": result.identity, "content": result.content, "path": result.path}
        return Completed(name=result.state, message=f"{result.uses}: {result.state.lower()}", data=manifest)

    return run
