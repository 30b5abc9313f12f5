"""The table of measurements. Imports no torch.

Part of every record's key are the content, the runtime and its version, the device and the threads (tasks/measurement/measure.py), besides what a row
names. A changed key makes stored records useless, so a test pins every key.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from compression.checkpoints.checkpoint import Checkpoint
from compression.data import fingerprint
from compression.evaluation import QUALITY_VERSION, SPEED_VERSION, latency
from compression.evaluation import energy as energy_counters
from compression.evaluation.answers import open_questions
from compression.evaluation.findings import Transform
from compression.evaluation.harness_tasks import find_tasks, fingerprint_task, task_metrics
from compression.evaluation.red_team import Probe, metric_names, probes
from compression.evaluation.spec import EvaluationSpec
from compression.evaluation.summaries import articles
from tasks.measurement.measurement import Measurement, MeasurementRequest
from tasks.store.identity import digest

Metrics = Mapping[str, Transform | None]


# --- what several rows share ---


def _test_text(request: MeasurementRequest) -> dict[str, Any]:
    return {"data": fingerprint(request.data, "evaluation")}


def _new_tokens(request: MeasurementRequest) -> dict[str, Any]:
    return {"new_tokens": request.evaluation.new_tokens}


def _written(request: MeasurementRequest) -> dict[str, Any]:
    """Settings of answers that a model writes, to prompts in its chat template where it has one."""
    return _new_tokens(request) | _system_message(request)


def _system_message(request: MeasurementRequest) -> dict[str, Any]:
    return {} if request.data.system is None else {"system": request.data.system}


def _digests(name: str, items: Iterable[Any]) -> dict[str, Any]:
    """The digest of dataclasses that were read from a file, wherever the file lies."""
    return {name: digest({name: [asdict(item) for item in items]})}


# --- one row each ---


def _energy_wanted(evaluation: EvaluationSpec) -> bool:
    source = evaluation.energy_source
    return source == "estimate" or (source == "counters" and bool(energy_counters.readable()))


def _energy_metrics(request: MeasurementRequest) -> Metrics:
    """An estimate has names of its own: where counters can be read too, a record has both."""
    estimated = [f"{name}_estimated" for name in energy_counters.NAMES] if request.evaluation.energy_source == "estimate" else []
    return dict.fromkeys([*energy_counters.NAMES, *estimated])


def _energy_settings(request: MeasurementRequest) -> dict[str, Any]:
    estimator = f"codecarbon {version('codecarbon')}" if request.evaluation.energy_source == "estimate" else None
    return _test_text(request) | _new_tokens(request) | {"counters": energy_counters.readable(), "estimated_by": estimator}


def _harness_parts(request: MeasurementRequest) -> dict[str, MeasurementRequest]:
    return {
        f"harness.{find_tasks((task,))[0].name}": replace(request, evaluation=request.evaluation.model_copy(update={"harness": (task,)}))
        for task in request.evaluation.harness
    }


def _harness_metrics(request: MeasurementRequest) -> Metrics:
    return {metric: transform for task in request.evaluation.harness for metric, transform in task_metrics(task).items()}


def _harness_settings(request: MeasurementRequest) -> dict[str, Any]:
    evaluation = request.evaluation
    (task,) = evaluation.harness
    return {
        "task": fingerprint_task(task), "limit": evaluation.limit, "num_fewshot": evaluation.num_fewshot, "chat": evaluation.harness_chat,
        "lm_eval": version("lm-eval"),
    } | _system_message(request)  # fmt: skip


def _quality_metrics(request: MeasurementRequest) -> Metrics:
    metrics: dict[str, Transform | None] = {"perplexity": "exp", "perplexity_count": None}
    if request.data.questions is not None:
        metrics |= {"accuracy": "mean", "accuracy_stderr": None, "accuracy_count": None}
    for role in request.roles:
        metrics |= {f"kl_to_{role}": "mean", f"kl_p99_to_{role}": None}
        metrics |= {f"top1_agreement_to_{role}": "mean", f"max_logit_difference_to_{role}": None}
    if "base" in request.roles:
        metrics["top1_agreement"] = "mean"
    if isinstance(request.planned, Checkpoint) and (request.planned.layout == "dense" or request.planned.sparse):
        metrics["sparsity"] = None
    return metrics


def _question_answering_settings(request: MeasurementRequest) -> dict[str, Any]:
    evaluation = request.evaluation
    assert evaluation.question_answering is not None  # or the measurement is not wanted
    return _digests("questions", open_questions(evaluation.question_answering, evaluation.limit)) | _written(request)


def _probes(request: MeasurementRequest) -> list[Probe]:
    assert request.evaluation.red_team_set is not None  # or the measurement is not wanted
    return list(probes(request.evaluation.red_team_set))


def _red_team_metrics(request: MeasurementRequest) -> Metrics:
    rates: dict[str, Transform | None] = dict.fromkeys(metric_names(_probes(request)), "mean")
    return rates | {"red_team_count": None}


def _red_team_settings(request: MeasurementRequest) -> dict[str, Any]:
    return _digests("prompts", _probes(request)) | _written(request)


def _samples_settings(request: MeasurementRequest) -> dict[str, Any]:
    return _test_text(request) | _new_tokens(request) | {"generations": request.evaluation.generations, "shown": request.evaluation.samples}


def _summarization_settings(request: MeasurementRequest) -> dict[str, Any]:
    evaluation = request.evaluation
    assert evaluation.summarization is not None  # or the measurement is not wanted
    return (
        _digests("documents", articles(evaluation.summarization, evaluation.limit))
        | _written(request)
        | {"rouge_score": version("rouge-score")}
    )


_SPEED_METRICS = (
    "tokens_per_second", "tokens_per_second_low", "tokens_per_second_high",
    "prefill_tokens_per_second", "prefill_tokens_per_second_low", "prefill_tokens_per_second_high",
    "first_token_seconds", "load_seconds", "cpu_wait_share", "peak_memory_mb",
)  # fmt: skip

MEASUREMENTS = (  # by name, the order in which they run
    Measurement(
        "energy", 2, _energy_metrics, _energy_settings, exclusive=True,
        wanted=_energy_wanted,
    ),
    Measurement(
        "harness", 3, _harness_metrics, _harness_settings, split=_harness_parts,
        wanted=lambda evaluation: len(evaluation.harness) > 0,
    ),
    Measurement(
        "latency", 2, lambda _: dict.fromkeys((*latency.NAMES, latency.WAITED)), lambda request: _test_text(request) | _new_tokens(request),
        exclusive=True, wanted=lambda evaluation: evaluation.suite == "release",
    ),
    Measurement("quality", QUALITY_VERSION, _quality_metrics, _test_text, compares=True),
    Measurement(
        "question_answering", 2, lambda _: {"exact_match": "mean", "f1": "mean", "question_answering_count": None}, _question_answering_settings,
        wanted=lambda evaluation: evaluation.question_answering is not None,
    ),
    Measurement(
        "red_team", 2, _red_team_metrics, _red_team_settings,
        wanted=lambda evaluation: evaluation.red_team_set is not None,
    ),
    Measurement(
        "samples", 2,
        lambda _: {"repetition_rate": "mean", "empty_rate": "mean", "invalid_utf8_rate": "mean", "generations_count": None}, _samples_settings,
        wanted=lambda evaluation: evaluation.generations > 0,
    ),
    Measurement("speed", SPEED_VERSION, lambda _: dict.fromkeys(_SPEED_METRICS), _test_text, exclusive=True),
    Measurement(
        "summarization", 2, lambda _: {"rouge_l": "mean", "summarization_count": None}, _summarization_settings,
        wanted=lambda evaluation: evaluation.summarization is not None,
    ),
)  # fmt: skip
