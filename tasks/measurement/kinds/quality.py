"""Perplexity, accuracy and divergence from the base and the parent, in the runtime that will run the model."""

from collections.abc import Mapping
from typing import Any, ClassVar

from compression.checkpoints.checkpoint import Checkpoint
from compression.data import fingerprint
from compression.evaluation import QUALITY_VERSION
from compression.evaluation.findings import Transform
from tasks.measurement.measurement import Measurement, MeasurementRequest, Subject


class Quality(Measurement):
    """One pass over the windows of the test text, one over the questions."""

    name: ClassVar[str] = "quality"
    version: ClassVar[int] = QUALITY_VERSION

    def metrics(self, asked: MeasurementRequest) -> Mapping[str, Transform | None]:
        found: dict[str, Transform | None] = {"perplexity": "exp", "perplexity_count": None}
        if asked.data.questions is not None:
            found |= {"accuracy": "mean", "accuracy_stderr": None, "accuracy_count": None}
        for role in asked.roles:
            found |= {f"kl_to_{role}": "mean", f"kl_p99_to_{role}": None}
            found |= {f"top1_agreement_to_{role}": "mean", f"max_logit_difference_to_{role}": None}
        if "base" in asked.roles:
            found["top1_agreement"] = "mean"
        if isinstance(asked.planned, Checkpoint) and (asked.planned.layout == "dense" or asked.planned.sparse):
            found["sparsity"] = None
        return found

    def document(self, subject: Subject) -> dict[str, Any]:
        references = {role: reference.content for role, reference in subject.references.items()}
        return {"data": fingerprint(subject.asked.data, "evaluation"), "references": references}

    def job(self, subject: Subject) -> tuple[str, dict[str, Any]]:
        return "tasks.runners.jobs:measure_quality", {
            "target": str(subject.target.path),
            "references": {role: str(reference.path) for role, reference in subject.references.items()},
            "tokenizer": str(subject.tokenizer),
            "data": subject.asked.data.model_dump(mode="json"),
        }
