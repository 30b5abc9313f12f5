"""The contract of a measurement: what is measured of a checkpoint or artifact, and which settings decide its figures. Imports no torch.

A measurement is one row of the table in tasks/measurement/kinds.py and one function of tasks/measurement/jobs.py. Measuring
(tasks/measurement/measure.py), caching, comparing with the base, gates, MLflow and the report find it there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.checkpoints.checkpoint import Checkpoint
from compression.data import DataSpec
from compression.evaluation.findings import Transform
from compression.evaluation.spec import EvaluationSpec
from tasks.stage import Planned
from tasks.store.identity import Machine


@dataclass(frozen=True)
class ReferenceModel:
    """A checkpoint or artifact: where it is, and the digest of its bytes."""

    path: Path
    content: str


@dataclass(frozen=True)
class MeasurementRequest:
    """What the plan knows about measurements of one checkpoint or artifact.

    Attributes:
        planned: The checkpoint or artifact.
        roles: The models that it is compared with: "base" (except the base itself), "parent" (an artifact).
        data: The recipe's `data`.
        evaluation: The recipe's `evaluation`, which turns measurements on.
    """

    planned: Planned
    roles: Sequence[str]
    data: DataSpec
    evaluation: EvaluationSpec


@dataclass(frozen=True)
class Subject:
    """The model to measure and the machine to measure it on.

    Attributes:
        request: What the plan knows about it.
        target: The checkpoint or artifact.
        references: The models that it is compared with, by role.
        tokenizer: A directory that holds the tokenizer.
        machine: The device and the threads to measure with.
    """

    request: MeasurementRequest
    target: ReferenceModel
    references: Mapping[str, ReferenceModel]
    tokenizer: Path
    machine: Machine


@dataclass(frozen=True)
class Measurement:
    """A kind of record.

    Attributes:
        name: The name of the record, and of the job's function (tasks/measurement/jobs.py).
        version: Part of the key. Raise it when a figure changes its value or meaning.
        metrics: Every metric that it may give, by name (`*` stands for a part that only the result has), with the transform of its items, or None
            where it has no items. Metrics with items get intervals and comparisons with the base.
        settings: What decides the figures besides the model, as JSON: data by fingerprint, settings of the recipe. Part of the key.
        wanted: Whether a recipe turns it on; None where every recipe does.
        split: Splits a request into parts by name with a record each, so that another part computes only itself. The name of a part is this
            measurement's, a dot, and the prefix of its metrics. None where a request is one record.
        compares: Whether it compares with the references, whose content is then part of the key.
        exclusive: Whether its figures depend on the machine, as time and energy do. Then it runs alone on the machine, the machine is part
            of the key, and quantized checkpoints, which run dequantized, do not get it.
    """

    name: str
    version: int
    metrics: Callable[[MeasurementRequest], Mapping[str, Transform | None]]
    settings: Callable[[MeasurementRequest], dict[str, Any]]
    wanted: Callable[[EvaluationSpec], bool] | None = None
    split: Callable[[MeasurementRequest], Mapping[str, MeasurementRequest]] | None = None
    compares: bool = False
    exclusive: bool = False

    def applies(self, request: MeasurementRequest) -> bool:
        """Return whether this checkpoint or artifact gets it. (A corpus gets none: no runtime opens it.)"""
        if self.exclusive and isinstance(request.planned, Checkpoint) and request.planned.layout != "dense":
            return False
        return self.wanted is None or self.wanted(request.evaluation)

    def parts(self, request: MeasurementRequest) -> Mapping[str, MeasurementRequest]:
        """Return the requests that get a record each, by name; none where the measurement does not apply."""
        if not self.applies(request):
            return {}
        return {self.name: request} if self.split is None else self.split(request)

    def document(self, request: MeasurementRequest, references: Mapping[str, ReferenceModel] | None = None) -> dict[str, Any]:
        """Return what decides the figures besides the model and the machine, as JSON."""
        contents = {role: reference.content for role, reference in (references or {}).items()}
        return self.settings(request) | ({"references": contents} if self.compares else {})
