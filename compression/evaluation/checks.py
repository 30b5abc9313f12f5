"""Whether an `evaluation:` section can work, before any work starts. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compression.data.templates import chat_template
from compression.errors import Incompatible, UnusableData
from compression.evaluation.answers import open_questions
from compression.evaluation.red_team import probes
from compression.evaluation.spec import EvaluationSpec
from compression.evaluation.summaries import articles


def check_evaluation(spec: EvaluationSpec, model: Path, max_length: int) -> None:
    """Read every file that the section names, whole, and look up every task.

    model       the base model's directory
    max_length  its positions
    Raises UnusableData with file and line for what is missing or of another shape, and Incompatible for generations that do not fit into the model.
    The packages that it needs are checked before (`extras`).
    """
    if spec.new_tokens >= max_length:
        raise Incompatible(
            f"{spec.new_tokens} new tokens leave no room for a prompt in the model's {max_length} positions", key="new_tokens"
        )
    if spec.question_answering:
        _read("question_answering", spec.question_answering, open_questions(spec.question_answering, spec.limit))
    if spec.summarization:
        _read("summarization", spec.summarization, articles(spec.summarization, spec.limit))
    if spec.red_team_set:
        _read("red_team", spec.red_team_set, probes(spec.red_team_set))
    if spec.harness_chat and chat_template(model) is None:
        raise Incompatible("the model has no chat template", key="harness_chat")
    if spec.harness:
        from compression.evaluation.harness_tasks import check_tasks

        check_tasks(spec.harness, max_length)


def _read(key: str, source: str, items: Iterator[Any]) -> None:
    """Read all of a file's lines, each of which may be refused, and refuse a file without any."""
    try:
        found = list(items)
    except UnusableData as error:
        raise UnusableData(str(error), key=key) from None
    if not found:
        raise UnusableData(f"{source} holds nothing", key=key)


def extras(spec: EvaluationSpec) -> dict[str, str]:
    """The extras of edgepress that a section needs, each with the key that needs it."""
    needed = {}
    if spec.harness or spec.summarization:
        needed["harness"] = "harness" if spec.harness else "summarization"
    if spec.energy_source == "estimate":
        needed["energy"] = "energy" if spec.energy else "suite"
    return needed
