"""What work is made of: a job, what it brings, how it fails, and the protocol of whoever runs it. Imports no torch.

The implementations are in tasks/runners: on this machine, on a Dask cluster, on the workers of a Prefect pool.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from compression.evaluation.findings import Items

EventHandler = Callable[[dict[str, Any]], None]
"""Hears of a job: {"progress": [done, total, what]}, {"metrics": {}, "step": n}, {"warning": text} from the job itself; {"note": text} about
where and how it is executed; {"restarted": text} when it starts anew because its worker was lost: what it reported before no longer counts."""


@dataclass(frozen=True)
class Job:
    """One call of `module:function(**arguments, threads=, context=)` in a child.

    call, arguments, threads, seed, device  what the child is told; the rest says how it is executed
    timeout    seconds it may work; one that takes longer has failed, and is not tried again
    alone      timing: nothing else of edgepress may run on the machine meanwhile, and it is the flow's own machine
    name       of the stage, for people
    memory     bytes it claims of a budget; from shapes alone, so rough
    devices    GPUs it claims, where `device` is one
    order      place of its stage in the plan: of jobs that wait for cores and memory the first goes first
    variables  for the infrastructure of a Prefect work pool: what a GPU or a memory request is there
    """

    call: str
    arguments: dict[str, Any]
    threads: int
    seed: int = 0
    device: str = "cpu"
    timeout: float | None = None
    exclusive: bool = False
    name: str = ""
    memory: int = 0
    devices: int = 1
    variables: Mapping[str, Any] = field(default_factory=dict)
    order: int = 0


@dataclass(frozen=True)
class JobResult:
    """What a child brought: what its function found, and the seconds it worked (waiting and start-up left out)."""

    metrics: dict[str, float]
    seconds: float
    items: dict[str, Items] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(document: Mapping[str, Any]) -> "JobResult":
        """As it stands in JSON: `result.json`."""
        items = {metric: Items.read(found) for metric, found in document["items"].items()}
        return JobResult(document["metrics"], document["seconds"], items, document["details"])


class Executor(Protocol):
    """All children of one flow."""

    def preload(self) -> None:
        """Make ready while the caller goes on; raises EdgepressError for what cannot work. From the main thread, before any job."""

    def run(self, job: Job, folder: Path, on_event: EventHandler) -> JobResult:
        """Run a job to its end and return what it brought; events reach `on_event` as they come. What it leaves is in `folder`.

        Raises EdgepressError (a cause the user can mend), JobFailed (a crash, a kill, a timeout).
        """

    @property
    def closed(self) -> bool:
        """Whether `close` was called: what waits for anything else on the flow's behalf gives up then."""

    def close(self) -> None:
        """End whatever runs, wherever; nothing can be started afterwards. May be called twice."""
