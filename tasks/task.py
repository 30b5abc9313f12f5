"""The Prefect task that runs any stage. The store caches results, not Prefect. Import it only where a flow runs."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import Task

from tasks.execution import is_transient, run_stage
from tasks.planned_stage import PlannedStage
from tasks.run_context import RunContext


async def _retry_condition(_: Any, __: TaskRun, state: State[Any]) -> bool:
    """Retry a lost process, never a wrong recipe or a failed gate."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, BaseException) and is_transient(error)


def stage_task(context: RunContext, stage: PlannedStage) -> Task[[], State[Any]]:
    """Return the Prefect task of one stage, named after the stage."""

    @task(
        name=stage.uses,
        task_run_name=stage.name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=stage.retries,
        retry_delay_seconds=1,
        retry_condition_fn=_retry_condition,
        tags=["edgepress"],
    )
    def run() -> State[Any]:
        result = run_stage(context, stage)
        manifest = {"stage": result.name, "identity": result.identity, "content": result.content, "path": result.path}
        return Completed(name=result.state, message=f"{result.uses}: {result.state.lower()}", data=manifest)

    return run
