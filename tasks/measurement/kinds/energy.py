"""Energy: joules of a generation, read or estimated."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, ClassVar

from compression.checkpoints.checkpoint import Checkpoint
from compression.data import fingerprint
from compression.evaluation.energy import NAMES, readable
from compression.evaluation.findings import Transform
from tasks.measurement.measurement import Measurement, MeasurementRequest, Subject


class Energy(Measurement):
    """Where the machine tells, or where an estimate was asked for. As with speed, not of quantized checkpoints, which run dequantized."""

    name: ClassVar[str] = "energy"
    version: ClassVar[int] = 2
    exclusive: ClassVar[bool] = True

    def applies(self, asked: MeasurementRequest) -> bool:
        if asked.settings is None or (isinstance(asked.planned, Checkpoint) and asked.planned.layout != "dense"):
            return False
        source = asked.settings.energy_source
        return source == "estimate" or (source == "counters" and bool(readable()))

    def metrics(self, asked: MeasurementRequest) -> Mapping[str, Transform | None]:
        names = dict.fromkeys(NAMES)
        return names if asked.settings.energy_source != "estimate" else {**names, **dict.fromkeys(f"{name}_estimated" for name in NAMES)}

    def document(self, subject: Subject) -> dict[str, Any]:
        settings = subject.asked.settings
        estimate = settings.energy_source == "estimate"
        return {
            "data": fingerprint(subject.asked.data, "evaluation"), "new_tokens": settings.new_tokens, "counters": readable(),
            "estimated_by": f"codecarbon {version('codecarbon')}" if estimate else None,
        }  # fmt: skip

    def job(self, subject: Subject) -> tuple[str, dict[str, Any]]:
        return "tasks.measurement.jobs:measure_energy", {
            "target": str(subject.target.path),
            "tokenizer": str(subject.tokenizer),
            "data": subject.asked.data.model_dump(mode="json"),
            "evaluation": subject.asked.settings.model_dump(mode="json"),
        }
