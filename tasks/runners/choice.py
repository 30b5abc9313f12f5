"""The choice of an executor, by the recipe. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

from tasks.runners.budget import Budget
from tasks.runners.executor import Executor
from tasks.runners.local import LocalExecutor
from tasks.runners.settings import ExecutionSettings


def open_executor(settings: ExecutionSettings, paths: Sequence[Path]) -> Executor:
    """Return the executor that the recipe chooses. It starts and contacts nothing before `preload`.

    Args:
        settings: The recipe's `execution:`.
        paths: What every worker must see in the same place: the store, the base model.
    """
    local = LocalExecutor(Budget(settings.cores, None if settings.memory_gib is None else int(settings.memory_gib * 2**30)))
    if settings.address is not None:
        from tasks.runners.dask import DaskExecutor

        return DaskExecutor(local, paths, settings.address)
    if settings.pool is not None:
        from tasks.runners.prefect_pool import PrefectExecutor

        return PrefectExecutor(local, paths, settings.pool)
    return local
