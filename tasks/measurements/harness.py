"""Tasks of lm-evaluation-harness."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, ClassVar

from compression.evaluation.findings import Transform
from compression.evaluation.harness_tasks import fingerprint_tasks
from tasks.measurement import Asked, Measurement, Subject


class Harness(Measurement):
    """Whatever tasks a recipe names, in the runtime that will run the model."""

    name: ClassVar[str] = "harness"
    version: ClassVar[int] = 1

    def applies(self, asked: Asked) -> bool:
        return asked.settings is not None and len(asked.settings.harness) > 0

    def metrics(self, asked: Asked) -> Mapping[str, Transform | None]:
        return {"harness.*": None}  # which of them have items, only the tasks know

    def document(self, subject: Subject) -> dict[str, Any]:
        settings = subject.asked.settings
        return {
            "tasks": fingerprint_tasks(settings.harness), "limit": settings.limit, "num_fewshot": settings.num_fewshot,
            "lm_eval": version("lm-eval"),
        }  # fmt: skip

    def job(self, subject: Subject) -> tuple[str, dict[str, Any]]:
        return "tasks.evaluation_jobs:run_harness", {
            "target": str(subject.target.path),
            "tokenizer": str(subject.tokenizer),
            "evaluation": subject.asked.settings.model_dump(mode="json"),
        }
