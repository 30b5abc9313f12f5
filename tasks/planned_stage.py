"""A stage of a planned pipeline, and its result. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.base import Base
from tasks.measurement.gates import Bound, Verdict
from tasks.stage import Artifact, Planned, Stage


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a planned pipeline; the base model is the first, and is only measured."""

    name: str
    index: int  # topological, 0 is the base model
    definition: Stage | None  # None for the base model
    identity: str  # the digest of the document
    document: dict[str, Any]  # what decides its bytes
    inputs: Mapping[str, str]  # names by role
    ancestors: tuple[str, ...]  # every stage it descends from, base first
    product: Planned
    outside: Mapping[str, Base] = field(default_factory=dict)  # models from outside the recipe, by role
    bounds: Mapping[str, Bound] = field(default_factory=dict)
    gates: Mapping[str, Bound] = field(default_factory=dict)
    retries: int = 0
    timeout: float | None = None
    memory: int = 0  # bytes that it claims from the budget
    job_variables: Mapping[str, Any] = field(default_factory=dict)  # of a Prefect work pool
    cell: str = ""  # the cell of a sweep, if no other cell needs it
    registered: str = ""  # the model in MLflow's registry that gets it as a version
    recompute: bool = False  # compute it even if the store has it

    @property
    def uses(self) -> str:
        """The name of its kind; "base" for the base model."""
        return self.definition.uses if self.definition else "base"

    @property
    def roles(self) -> tuple[str, ...]:
        """The models that its measurements compare it with."""
        if self.definition is None:
            return ()
        return ("base", "parent") if isinstance(self.product, Artifact) else ("base",)


@dataclass
class Result:
    """What a run knows about a stage, complete when the stage has ended."""

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
    computed: bool = False  # by this run
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    curves: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)  # what measurements keep besides metrics: texts, per-item results
    reason: str = ""  # why it failed, was stopped or skipped
    run: str = ""  # its run in MLflow
