"""Who runs the jobs of a flow, as its recipe says. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

from tasks.runners.executor import Children
from tasks.runners.budget import Budget
from tasks.runners.local import LocalChildren
from tasks.runners.settings import Runner


def open_children(settings: Runner, paths: Sequence[Path]) -> Children:
    """The children of a flow, as its recipe says. Nothing is started or asked before `preload`.

    paths  of this machine that every worker must see in the same place: the store, the base model
    """
    local = LocalChildren(Budget(settings.cores, None if settings.memory_gib is None else int(settings.memory_gib * 2**30)))
    if settings.address is not None:
        from tasks.runners.dask import DaskChildren

        return DaskChildren(local, paths, settings.address)
    if settings.pool is not None:
        from tasks.runners.prefect_pool import PrefectChildren

        return PrefectChildren(local, paths, settings.pool)
    return local
