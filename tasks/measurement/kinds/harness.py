"""Tasks of lm-evaluation-harness."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any, ClassVar

from compression.evaluation.findings import Transform
from compression.evaluation.harness_tasks import find_tasks, fingerprint_task, task_metrics
from tasks.measurement.measurement import Measurement, MeasurementRequest, Subject


class Harness(Measurement):
    """Whatever tasks a recipe names, in the runtime that will run the model; each has a record of its own."""

    name: ClassVar[str] = "harness"
    version: ClassVar[int] = 3

    def applies(self, asked: MeasurementRequest) -> bool:
        return asked.settings is not None and len(asked.settings.harness) > 0

    def parts(self, asked: MeasurementRequest) -> Mapping[str, MeasurementRequest]:
        named = {f"{self.name}.{find_tasks((task,))[0].name}": task for task in asked.settings.harness}
        return {name: replace(asked, settings=asked.settings.model_copy(update={"harness": (task,)})) for name, task in named.items()}

    def metrics(self, asked: MeasurementRequest) -> Mapping[str, Transform | None]:
        return {metric: transform for task in asked.settings.harness for metric, transform in task_metrics(task).items()}

    def document(self, subject: Subject) -> dict[str, Any]:
        settings = subject.asked.settings
        (task,) = settings.harness
        return {
            "task": fingerprint_task(task), "limit": settings.limit, "num_fewshot": settings.num_fewshot, "chat": settings.harness_chat,
            "lm_eval": version("lm-eval"),
        } | subject.asked.chat  # fmt: skip

    def job(self, subject: Subject) -> tuple[str, dict[str, Any]]:
        return "tasks.measurement.jobs:run_harness", {
            "target": str(subject.target.path),
            "tokenizer": str(subject.tokenizer),
            "evaluation": subject.asked.settings.model_dump(mode="json"),
        } | subject.asked.chat
