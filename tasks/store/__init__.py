"""What is kept: results by identity, their measurements, and the journal of each run. Imports no torch."""

from typing import TYPE_CHECKING

from compression.lazy import lazy_names

if TYPE_CHECKING:
    from tasks.store.garbage import collect_garbage, verify
    from tasks.store.identity import Machine, digest
    from tasks.store.journal import Run, read_run, read_runs
    from tasks.store.store import Entry, Store

__all__ = ["Entry", "Machine", "Run", "Store", "collect_garbage", "digest", "read_run", "read_runs", "verify"]
__getattr__ = lazy_names(
    __name__,
    Entry="tasks.store.store",
    Machine="tasks.store.identity",
    Run="tasks.store.journal",
    Store="tasks.store.store",
    collect_garbage="tasks.store.garbage",
    digest="tasks.store.identity",
    read_run="tasks.store.journal",
    read_runs="tasks.store.journal",
    verify="tasks.store.garbage",
)
