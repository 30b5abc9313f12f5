"""The measurements themselves, which a child runs: one function for each row of tasks/measurement/kinds.py. Imports torch inside its functions."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression.context import Context
from compression.data import DataSpec
from compression.evaluation.findings import Findings
from compression.evaluation.spec import EvaluationSpec
from export.runtimes import import_runtime, open_runtime, open_text, runtime_name

if TYPE_CHECKING:
    import torch

    from compression.evaluation.runtime import Runtime
    from compression.evaluation.writing import Writer


@dataclass
class _Subject:
    """A checkpoint or artifact in the child that measures it."""

    path: Path
    tokenizer_folder: Path
    references: Mapping[str, Path]  # by role
    data: DataSpec
    evaluation: EvaluationSpec
    threads: int
    context: Context

    @cached_property
    def tokenizer(self) -> Any:
        from compression.checkpoints.loading import load_tokenizer

        return load_tokenizer(self.tokenizer_folder)

    @cached_property
    def windows(self) -> "torch.Tensor":
        """Token ids of the evaluation text, [count, length]."""
        from compression.data import evaluation_windows

        return evaluation_windows(self.data, self.tokenizer)

    @property
    def prompt(self) -> list[int]:
        """Half a window of the evaluation text, as token ids."""
        window = self.windows[0].tolist()
        return window[: len(window) // 2]

    def open(self) -> "Runtime":
        return open_runtime(self.path, device=self.context.device, threads=self.threads)

    @contextmanager
    def writer(self) -> "Iterator[Writer]":
        """The model as it answers prompts, in its chat template where it has one."""
        from compression.evaluation.writing import Writer

        with closing(self.open()) as runtime:
            yield Writer(runtime, open_text(self.path, runtime), self.evaluation.new_tokens, self.data.system)


def measure(
    *,
    measurement: str,
    target: str,
    tokenizer: str,
    references: dict[str, str],
    data: dict[str, Any],
    evaluation: dict[str, Any],
    threads: int,
    context: Context,
) -> Findings | dict[str, float]:
    """Make one measurement of a checkpoint or artifact.

    Args:
        measurement: Its name in tasks/measurement/kinds.py.
        target: The directory (or file) of the checkpoint or artifact.
        tokenizer: A directory that holds the tokenizer.
        references: Directories of the checkpoints to compare with, by role.
        data: The recipe's `data` as JSON.
        evaluation: The recipe's `evaluation` as JSON.
        threads: Threads of the runtime.
        context: Device, seed and progress of the job.
    """
    subject = _Subject(
        Path(target), Path(tokenizer), {role: Path(path) for role, path in references.items()}, DataSpec.model_validate(data),
        EvaluationSpec.model_validate(evaluation), threads, context,
    )  # fmt: skip
    return JOBS[measurement](subject)


def _energy(subject: _Subject) -> Findings:
    from compression.evaluation.energy import measure_energy

    name = runtime_name(subject.path)
    import_runtime(name)
    return measure_energy(
        subject.open, subject.prompt, new_tokens=subject.evaluation.new_tokens,
        device=subject.context.device if name == "transformers" else "cpu", estimate=subject.evaluation.energy_source == "estimate",
        context=subject.context,
    )  # fmt: skip


def _harness(subject: _Subject) -> Findings:
    from compression.evaluation.harness import HarnessModel, evaluate_tasks
    from compression.evaluation.harness_tasks import find_tasks

    spec = subject.evaluation
    tasks = find_tasks(spec.harness)
    with closing(subject.open()) as runtime:
        model = HarnessModel(runtime, subject.tokenizer, open_text(subject.path, runtime), subject.context)
        return evaluate_tasks(
            model, tasks, limit=spec.limit, num_fewshot=spec.num_fewshot, chat=spec.harness_chat, system=subject.data.system
        )


def _latency(subject: _Subject) -> dict[str, float]:
    from compression.evaluation.latency import measure_latency

    prompt = subject.prompt
    with closing(subject.open()) as runtime:
        return measure_latency(runtime, prompt, new_tokens=subject.evaluation.new_tokens)


def _quality(subject: _Subject) -> Findings:
    """Perplexity, accuracy and divergence from each reference checkpoint, in the runtime that opens the target; sparsity of a dense checkpoint."""
    from compression.data import questions
    from compression.evaluation.scorers import evaluate_quality
    from compression.evaluation.sparsity import sparsity
    from compression.evaluation.transformers_runtime import TransformersRuntime

    data, context = subject.data, subject.context
    runtime = subject.open()
    by_path = {path: TransformersRuntime(path, device=context.device, threads=subject.threads) for path in set(subject.references.values())}
    items = questions(data, "test") if data.questions is not None else []
    try:
        references = {role: by_path[path] for role, path in subject.references.items()}
        findings = evaluate_quality(
            runtime, subject.tokenizer, subject.windows, items, references=references, context=context, system=data.system
        )
    finally:
        for opened in (runtime, *by_path.values()):
            opened.close()
    if runtime.name == "transformers" and (share := sparsity(subject.path)) is not None:
        findings.metrics["sparsity"] = share
    return findings


def _question_answering(subject: _Subject) -> Findings:
    from compression.evaluation.answers import answer_questions, open_questions

    spec = subject.evaluation
    assert spec.question_answering is not None  # or the measurement is not wanted
    with subject.writer() as writer:
        return answer_questions(writer, list(open_questions(spec.question_answering, spec.limit)), subject.context)


def _red_team(subject: _Subject) -> Findings:
    from compression.evaluation.red_team import probe_refusals, probes

    assert subject.evaluation.red_team_set is not None  # or the measurement is not wanted
    with subject.writer() as writer:
        return probe_refusals(writer, list(probes(subject.evaluation.red_team_set)), subject.context)


def _samples(subject: _Subject) -> Findings:
    from compression.evaluation.samples import generate_samples

    spec, windows = subject.evaluation, subject.windows
    with subject.writer() as writer:
        return generate_samples(writer, windows, count=spec.generations, shown=spec.samples, context=subject.context)


def _speed(subject: _Subject) -> dict[str, float]:
    from compression.evaluation.speed import measure_speed

    import_runtime(runtime_name(subject.path))  # or its time and memory would count as the model's
    return measure_speed(subject.open, subject.prompt, new_tokens=len(subject.prompt))


def _summarization(subject: _Subject) -> Findings:
    from compression.evaluation.summaries import articles, summarize

    spec = subject.evaluation
    assert spec.summarization is not None  # or the measurement is not wanted
    with subject.writer() as writer:
        return summarize(writer, list(articles(spec.summarization, spec.limit)), subject.context)


JOBS: Mapping[str, Callable[[_Subject], Findings | dict[str, float]]] = {
    "energy": _energy,
    "harness": _harness,
    "latency": _latency,
    "quality": _quality,
    "question_answering": _question_answering,
    "red_team": _red_team,
    "samples": _samples,
    "speed": _speed,
    "summarization": _summarization,
}
