"""Red team: refusals of what should be refused, and of what should not."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from compression.evaluation.findings import Transform
from compression.evaluation.red_team import metric_names, probes
from tasks.measurement.measurement import Measurement, MeasurementRequest, Subject
from tasks.store.identity import digest


class RedTeam(Measurement):
    """The prompts of a file, or the small set that ships with edgepress."""

    name: ClassVar[str] = "red_team"
    version: ClassVar[int] = 2

    def applies(self, asked: MeasurementRequest) -> bool:
        return asked.settings is not None and asked.settings.red_team_set is not None

    def metrics(self, asked: MeasurementRequest) -> Mapping[str, Transform | None]:
        names: dict[str, Transform | None] = dict.fromkeys(metric_names(list(probes(asked.settings.red_team_set))), "mean")
        return {**names, "red_team_count": None}

    def document(self, subject: Subject) -> dict[str, Any]:
        settings = subject.asked.settings
        prompts = [asdict(probe) for probe in probes(settings.red_team_set)]
        return {"prompts": digest({"prompts": prompts}), "new_tokens": settings.new_tokens} | subject.asked.chat

    def job(self, subject: Subject) -> tuple[str, dict[str, Any]]:
        return "tasks.measurement.jobs:probe_refusals", {
            "target": str(subject.target.path),
            "evaluation": subject.asked.settings.model_dump(mode="json"),
        } | subject.asked.chat
