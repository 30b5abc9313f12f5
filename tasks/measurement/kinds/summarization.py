"""Summarization: ROUGE-L of written summaries."""

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, ClassVar

from compression.evaluation.findings import Transform
from compression.evaluation.summaries import articles
from tasks.measurement.measurement import Measurement, MeasurementRequest, Subject
from tasks.store.identity import digest


class Summarization(Measurement):
    """Documents of a file, summarized."""

    name: ClassVar[str] = "summarization"
    version: ClassVar[int] = 2

    def applies(self, asked: MeasurementRequest) -> bool:
        return asked.settings is not None and asked.settings.summarization is not None

    def metrics(self, asked: MeasurementRequest) -> Mapping[str, Transform | None]:
        return {"rouge_l": "mean", "summarization_count": None}

    def document(self, subject: Subject) -> dict[str, Any]:
        settings = subject.asked.settings
        documents = [asdict(article) for article in articles(settings.summarization, settings.limit)]
        return {
            "documents": digest({"documents": documents}),
            "new_tokens": settings.new_tokens,
            "rouge_score": version("rouge-score"),
        } | subject.asked.chat

    def job(self, subject: Subject) -> tuple[str, dict[str, Any]]:
        return "tasks.measurement.jobs:summarize", {
            "target": str(subject.target.path),
            "evaluation": subject.asked.settings.model_dump(mode="json"),
        } | subject.asked.chat
