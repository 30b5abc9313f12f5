"""Where jobs run: in children of this process, on a Dask cluster, on workers of a Prefect pool. Imports no torch."""

from typing import TYPE_CHECKING

from compression.lazy import lazy_names

if TYPE_CHECKING:
    from tasks.runners.choice import open_executor
    from tasks.runners.executor import Executor, Job, JobResult
    from tasks.runners.local import LocalExecutor
    from tasks.runners.settings import ExecutionSettings

__all__ = ["ExecutionSettings", "Executor", "Job", "JobResult", "LocalExecutor", "open_executor"]
__getattr__ = lazy_names(
    __name__,
    ExecutionSettings="tasks.runners.settings",
    Executor="tasks.runners.executor",
    Job="tasks.runners.executor",
    JobResult="tasks.runners.executor",
    LocalExecutor="tasks.runners.local",
    open_executor="tasks.runners.choice",
)
