"""What the stages of one run share. Imports no torch."""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compression.data import DataSpec
from tasks.base import Base
from tasks.measurement.measure import Measured
from tasks.planned_stage import Result
from tasks.runners.executor import Executor
from tasks.store.identity import Machine
from tasks.store.store import Store
from tasks.tracking import Tracking


@dataclass(frozen=True)
class TrackedRuns:
    """The runs in MLflow that a pipeline opens or resumes before its stages.

    Attributes:
        parent: The run of the whole pipeline.
        name: The tag of all its runs (tasks/tracking/runs_view.py).
        cells: The runs of a sweep's cells, by name.
        known: The runs of stages that the resumed run opened, by name.
        superseded: Such runs of stages that have another identity now.
        series: The suffixes of a stage's metrics on the parent run.
        leaves: The stages that no other stage follows.
    """

    parent: str
    name: str = ""
    cells: Mapping[str, str] = field(default_factory=dict)
    known: Mapping[str, str] = field(default_factory=dict)
    superseded: Mapping[str, str] = field(default_factory=dict)
    series: Mapping[str, Sequence[str]] = field(default_factory=dict)
    leaves: Collection[str] = ()


@dataclass
class RunContext:
    """Everything that the stages of one run share: its settings, its services, and the results so far.

    Attributes:
        name: The name of the recipe.
        documents: Identity and identity document of every stage, by name.
        progress: Called with the name of a stage and an event of it.
        evaluation: The recipe's settings of optional measurements.
        remeasure: Whether timings are repeated even if the store has them.
        results: By name of the stage, from its beginning.
        measured: By name of the stage.
        lock: Guards `results`.
    """

    name: str
    store: Store
    executor: Executor
    tracking: Tracking
    runs: TrackedRuns
    data: DataSpec
    machine: Machine
    base: Base
    outputs: Path
    documents: dict[str, tuple[str, dict[str, Any]]]
    progress: Callable[[str, dict[str, Any]], None]
    evaluation: Any = None
    remeasure: bool = False
    results: dict[str, Result] = field(default_factory=dict)
    measured: dict[str, Measured] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
