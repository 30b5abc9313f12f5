"""Speed, load time and memory, in the runtime that will run the model."""

from collections.abc import Mapping
from typing import Any, ClassVar

from compression.checkpoints.checkpoint import Checkpoint
from compression.data import fingerprint
from compression.evaluation import SPEED_VERSION
from compression.evaluation.findings import Transform
from tasks.measurement.measurement import Measurement, MeasurementRequest, Subject

_NAMES = (
    "tokens_per_second", "tokens_per_second_low", "tokens_per_second_high",
    "prefill_tokens_per_second", "prefill_tokens_per_second_low", "prefill_tokens_per_second_high",
    "first_token_seconds", "load_seconds", "cpu_wait_share", "peak_memory_mb",
)  # fmt: skip


class Speed(Measurement):
    """Greedy generation after half a window of the test text."""

    name: ClassVar[str] = "speed"
    version: ClassVar[int] = SPEED_VERSION
    exclusive: ClassVar[bool] = True

    def applies(self, asked: MeasurementRequest) -> bool:
        """Quantized checkpoints run dequantized, which tells their quality but not their speed."""
        return not isinstance(asked.planned, Checkpoint) or asked.planned.layout == "dense"

    def metrics(self, asked: MeasurementRequest) -> Mapping[str, Transform | None]:
        return dict.fromkeys(_NAMES)

    def document(self, subject: Subject) -> dict[str, Any]:
        return {"data": fingerprint(subject.asked.data, "evaluation")}

    def job(self, subject: Subject) -> tuple[str, dict[str, Any]]:
        return "tasks.runners.jobs:measure_speed", {
            "target": str(subject.target.path),
            "tokenizer": str(subject.tokenizer),
            "data": subject.asked.data.model_dump(mode="json"),
        }
