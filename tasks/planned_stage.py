"""A stage of a planned pipeline: what it is asked to do, and what came of it. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.base import Base
from tasks.measurement.gates import Bound, Verdict
from tasks.stage import Artifact, Planned, Stage


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a planned pipeline. `definition` is None for the base model, which is only measured."""

    name: str
    index: int  # topological, 0 is the base model
    definition: Stage | None
    identity: str
    document: dict[str, Any]  # what the identity is the digest of
    inputs: Mapping[str, str]  # names by role
    ancestors: tuple[str, ...]  # every stage it descends from, base first
    product: Planned
    outside: Mapping[str, Base] = field(default_factory=dict)  # models from outside the recipe, by role
    bounds: Mapping[str, Bound] = field(default_factory=dict)
    gates: Mapping[str, Bound] = field(default_factory=dict)
    retries: int = 0
    timeout: float | None = None
    memory: int = 0  # bytes that it claims of a budget
    job_variables: Mapping[str, Any] = field(default_factory=dict)  # of a Prefect work pool
    cell: str = ""  # the cell of a sweep that alone needs it, if one does
    registered: str = ""  # the model in MLflow's registry that it becomes a version of
    recompute: bool = False  # compute it even if the store has it

    @property
    def roles(self) -> tuple[str, ...]:
        """What it is compared with when it is measured."""
        if self.definition is None:
            return ()
        return ("base", "parent") if isinstance(self.product, Artifact) else ("base",)


@dataclass
class Result:
    """What is known about a stage when it is done, or failed."""

    name: str
    uses: str
    needs: list[str]
    state: str  # Running, Completed, Cached, Failed, Stopped, Skipped
    identity: str = ""
    path: str = ""
    content: str = ""
    runtime: str = ""
    seconds: float = 0.0
    measure_seconds: float = 0.0
    computed: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    curves: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)  # what measurements keep besides metrics: texts, per-item results
    reason: str = ""
    run: str = ""
