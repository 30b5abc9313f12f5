"""What a child is asked to measure when a recipe's `evaluation:` says so. Works with torch, inside its functions."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression.context import Context
from compression.data import DataSpec
from compression.evaluation.findings import Findings
from compression.evaluation.spec import EvaluationSpec
from export.runtimes import import_runtime, open_runtime, open_text, runtime_name

if TYPE_CHECKING:
    from compression.evaluation.writing import Writer


def generate_samples(
    *, target: str, tokenizer: str, data: dict[str, Any], evaluation: dict[str, Any], threads: int, context: Context
) -> Findings:
    """Continuations of the beginnings of evaluation windows, and how sane they are."""
    from compression.checkpoints.loading import load_tokenizer
    from compression.data import evaluation_windows
    from compression.evaluation.samples import generate_samples as generate

    spec = EvaluationSpec.model_validate(evaluation)
    windows = evaluation_windows(DataSpec.model_validate(data), load_tokenizer(Path(tokenizer)))
    with _writer(target, spec, threads, context) as writer:
        return generate(writer, windows, count=spec.generations, shown=spec.samples, context=context)


def answer_questions(*, target: str, evaluation: dict[str, Any], threads: int, context: Context, system: str | None = None) -> Findings:
    """Exact match and F1 of written answers."""
    from compression.evaluation.answers import answer_questions as answer
    from compression.evaluation.answers import open_questions

    spec = EvaluationSpec.model_validate(evaluation)
    assert spec.question_answering is not None  # else nobody asks
    with _writer(target, spec, threads, context, system) as writer:
        return answer(writer, list(open_questions(spec.question_answering, spec.limit)), context)


def summarize(*, target: str, evaluation: dict[str, Any], threads: int, context: Context, system: str | None = None) -> Findings:
    """ROUGE-L of written summaries."""
    from compression.evaluation.summaries import articles
    from compression.evaluation.summaries import summarize as summaries

    spec = EvaluationSpec.model_validate(evaluation)
    assert spec.summarization is not None  # else nobody asks
    with _writer(target, spec, threads, context, system) as writer:
        return summaries(writer, list(articles(spec.summarization, spec.limit)), context)


def probe_refusals(*, target: str, evaluation: dict[str, Any], threads: int, context: Context, system: str | None = None) -> Findings:
    """Refusals of the red-team set."""
    from compression.evaluation.red_team import probe_refusals as probe
    from compression.evaluation.red_team import probes

    spec = EvaluationSpec.model_validate(evaluation)
    assert spec.red_team_set is not None  # else nobody asks
    with _writer(target, spec, threads, context, system) as writer:
        return probe(writer, list(probes(spec.red_team_set)), context)


def run_harness(
    *, target: str, tokenizer: str, evaluation: dict[str, Any], threads: int, context: Context, system: str | None = None
) -> Findings:
    """Tasks of lm-evaluation-harness."""
    from compression.checkpoints.loading import load_tokenizer
    from compression.evaluation.harness import HarnessModel, evaluate_tasks
    from compression.evaluation.harness_tasks import find_tasks

    spec = EvaluationSpec.model_validate(evaluation)
    tasks = find_tasks(spec.harness)
    with closing(open_runtime(Path(target), device=context.device, threads=threads)) as runtime:
        model = HarnessModel(runtime, load_tokenizer(Path(tokenizer)), open_text(Path(target), runtime), context)
        return evaluate_tasks(model, tasks, limit=spec.limit, num_fewshot=spec.num_fewshot, chat=spec.harness_chat, system=system)


def measure_latency(
    *, target: str, tokenizer: str, data: dict[str, Any], evaluation: dict[str, Any], threads: int, context: Context
) -> dict[str, float]:
    """Seconds by token, after half a window of the evaluation text."""
    from compression.evaluation.latency import measure_latency as measure

    prompt = _prompt(tokenizer, data)
    new_tokens = EvaluationSpec.model_validate(evaluation).new_tokens
    with closing(open_runtime(Path(target), device=context.device, threads=threads)) as runtime:
        return measure(runtime, prompt, new_tokens=new_tokens)


def measure_energy(
    *, target: str, tokenizer: str, data: dict[str, Any], evaluation: dict[str, Any], threads: int, context: Context
) -> Findings:
    """Joules of a generation, after half a window of the evaluation text."""
    from compression.evaluation.energy import measure_energy as measure

    spec = EvaluationSpec.model_validate(evaluation)
    name = runtime_name(Path(target))
    import_runtime(name)
    prompt = _prompt(tokenizer, data)
    return measure(
        lambda: open_runtime(Path(target), device=context.device, threads=threads), prompt, new_tokens=spec.new_tokens,
        device=context.device if name == "transformers" else "cpu", estimate=spec.energy_source == "estimate", context=context,
    )  # fmt: skip


@contextmanager
def _writer(target: str, spec: EvaluationSpec, threads: int, context: Context, system: str | None = None) -> "Iterator[Writer]":
    from compression.evaluation.writing import Writer

    with closing(open_runtime(Path(target), device=context.device, threads=threads)) as runtime:
        yield Writer(runtime, open_text(Path(target), runtime), spec.new_tokens, system)


def _prompt(tokenizer: str, data: dict[str, Any]) -> list[int]:
    from compression.checkpoints.loading import load_tokenizer
    from compression.data import evaluation_windows

    window = evaluation_windows(DataSpec.model_validate(data), load_tokenizer(Path(tokenizer)))[0].tolist()
    return window[: len(window) // 2]
