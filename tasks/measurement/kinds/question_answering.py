"""Question answering: exact match and F1 of written answers."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from compression.evaluation.answers import open_questions
from compression.evaluation.findings import Transform
from tasks.measurement.measurement import Measurement, MeasurementRequest, Subject
from tasks.store.identity import digest


class QuestionAnswering(Measurement):
    """Questions of a file, or of the embedded world, answered in writing."""

    name: ClassVar[str] = "question_answering"
    version: ClassVar[int] = 2

    def applies(self, asked: MeasurementRequest) -> bool:
        return asked.settings is not None and asked.settings.question_answering is not None

    def metrics(self, asked: MeasurementRequest) -> Mapping[str, Transform | None]:
        return {"exact_match": "mean", "f1": "mean", "question_answering_count": None}

    def document(self, subject: Subject) -> dict[str, Any]:
        settings = subject.asked.settings
        questions = [asdict(question) for question in open_questions(settings.question_answering, settings.limit)]
        return {"questions": digest({"questions": questions}), "new_tokens": settings.new_tokens} | subject.asked.chat

    def job(self, subject: Subject) -> tuple[str, dict[str, Any]]:
        return "tasks.measurement.jobs:answer_questions", {
            "target": str(subject.target.path),
            "evaluation": subject.asked.settings.model_dump(mode="json"),
        } | subject.asked.chat
