"""Latency: the middle and the tail of the seconds that a token takes."""

from collections.abc import Mapping
from typing import Any, ClassVar

from compression.checkpoints.checkpoint import Checkpoint
from compression.data import fingerprint
from compression.evaluation.findings import Transform
from compression.evaluation.latency import NAMES, WAITED
from tasks.measurement.measurement import Measurement, MeasurementRequest, Subject


class Latency(Measurement):
    """Part of the release suite, where an average does not do. As with speed, not of quantized checkpoints, which run dequantized."""

    name: ClassVar[str] = "latency"
    version: ClassVar[int] = 2
    exclusive: ClassVar[bool] = True

    def applies(self, asked: MeasurementRequest) -> bool:
        dense = not isinstance(asked.planned, Checkpoint) or asked.planned.layout == "dense"
        return dense and asked.settings is not None and asked.settings.suite == "release"

    def metrics(self, asked: MeasurementRequest) -> Mapping[str, Transform | None]:
        return dict.fromkeys((*NAMES, WAITED))

    def document(self, subject: Subject) -> dict[str, Any]:
        return {"data": fingerprint(subject.asked.data, "evaluation"), "new_tokens": subject.asked.settings.new_tokens}

    def job(self, subject: Subject) -> tuple[str, dict[str, Any]]:
        return "tasks.measurement.jobs:measure_latency", {
            "target": str(subject.target.path),
            "tokenizer": str(subject.tokenizer),
            "data": subject.asked.data.model_dump(mode="json"),
            "evaluation": subject.asked.settings.model_dump(mode="json"),
        }
