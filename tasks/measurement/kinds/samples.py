"""Generated text: samples that people read side by side, and how sane it is."""

from collections.abc import Mapping
from typing import Any, ClassVar

from compression.data import fingerprint
from compression.evaluation.findings import Transform
from tasks.measurement.measurement import Measurement, MeasurementRequest, Subject


class Samples(Measurement):
    """Greedy continuations of the beginnings of evaluation windows."""

    name: ClassVar[str] = "samples"
    version: ClassVar[int] = 2

    def applies(self, asked: MeasurementRequest) -> bool:
        return asked.settings is not None and asked.settings.generations > 0

    def metrics(self, asked: MeasurementRequest) -> Mapping[str, Transform | None]:
        return {"repetition_rate": "mean", "empty_rate": "mean", "invalid_utf8_rate": "mean", "generations_count": None}

    def document(self, subject: Subject) -> dict[str, Any]:
        settings = subject.asked.settings
        return {
            "data": fingerprint(subject.asked.data, "evaluation"), "generations": settings.generations, "shown": settings.samples,
            "new_tokens": settings.new_tokens,
        }  # fmt: skip

    def job(self, subject: Subject) -> tuple[str, dict[str, Any]]:
        return "tasks.measurement.jobs:generate_samples", {
            "target": str(subject.target.path),
            "tokenizer": str(subject.tokenizer),
            "data": subject.asked.data.model_dump(mode="json"),
            "evaluation": subject.asked.settings.model_dump(mode="json"),
        }
