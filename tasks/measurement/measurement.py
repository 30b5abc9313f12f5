"""What a measurement is: a kind of record about a checkpoint or artifact, and the job that makes it. Imports no torch.

A measurement is one file with one subclass of `Measurement` in tasks/measurement/kinds. Nothing else has to be edited: measuring (tasks/measurement/measure.py), caching,
comparing with the base, gates, MLflow and the report find it.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from compression.data import DataSpec
from compression.evaluation.findings import Transform
from tasks.stage import Planned
from tasks.store.identity import Machine


@dataclass(frozen=True)
class ReferenceModel:
    """A checkpoint or artifact: where it is, and the digest of its bytes."""

    path: Path
    content: str


@dataclass(frozen=True)
class MeasurementRequest:
    """What is known of a measurement while planning.

    planned   the checkpoint or artifact
    roles     what it will be compared with: "base" (not of the base itself), "parent" (of an artifact)
    data      the recipe's
    settings  the recipe's `evaluation`, for measurements that it turns on
    """

    planned: Planned
    roles: Sequence[str]
    data: DataSpec
    settings: Any

    @property
    def chat(self) -> dict[str, str]:
        """The system message of prompts in a chat template, where the recipe gives one: in the record's key, and an argument of the job."""
        return {} if self.data.system is None else {"system": self.data.system}


@dataclass(frozen=True)
class Subject:
    """What is measured: `asked` come true."""

    asked: MeasurementRequest
    target: ReferenceModel
    references: Mapping[str, ReferenceModel]  # by role
    tokenizer: Path  # a directory that holds it
    machine: Machine


class Measurement(ABC):
    """Base of every kind of record.

    name     the record's
    version  raise it when a figure changes its value or meaning
    alone    whether it is taken alone on the machine; then the machine is part of its key

    Part of every key are the content, the runtime and its version, the type of the device and the number of threads.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    exclusive: ClassVar[bool] = False

    def applies(self, asked: MeasurementRequest) -> bool:
        """Whether it is made of this checkpoint or artifact, in a recipe with these settings. Never asked of a corpus, which no runtime opens."""
        return True

    def parts(self, asked: MeasurementRequest) -> Mapping[str, MeasurementRequest]:
        """What gets a record of its own each, so that one more that is asked for computes only that. Default: all of it is one.

        By a name: this measurement's, or one with a dot behind that its metrics begin with.
        """
        return {self.name: asked}

    @abstractmethod
    def metrics(self, asked: MeasurementRequest) -> Mapping[str, Transform | None]:
        """Every metric it may give, by name (`*` stands for what only the result tells), with the transform of its items or None without items.

        Metrics with items get intervals, and comparisons with the base, without further ado.
        """

    @abstractmethod
    def document(self, subject: Subject) -> dict[str, Any]:
        """What else decides its figures: data by fingerprint, references by content, settings. JSON."""

    @abstractmethod
    def job(self, subject: Subject) -> tuple[str, dict[str, Any]]:
        """What a child calls, as `module:function`, and its arguments. The function gets `threads` and `context` too, and returns Findings."""


@lru_cache(maxsize=1)
def measurements() -> tuple[Measurement, ...]:
    """Every measurement of tasks/measurement/kinds, by name."""
    package = importlib.import_module("tasks.measurement.kinds")
    modules = [importlib.import_module(f"tasks.measurement.kinds.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    kinds = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Measurement) and value.__module__ == module.__name__
    }
    return tuple(sorted((kind() for kind in kinds), key=lambda measurement: measurement.name))
