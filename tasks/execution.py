"""The execution of one stage, under any scheduler: look into the store, compute in a child process, measure, judge, publish. Imports no torch."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compression.checkpoints.checkpoint import Checkpoint
from compression.data import fingerprint
from compression.errors import EdgepressError
from compression.redaction import redacted
from export.runtimes import runtime_name
from tasks.artifact import complete_artifact, origin_of
from tasks.base import is_unchanged
from tasks.errors import Cancelled
from tasks.kinds._training import TrainingStage
from tasks.measurement.figures import most_contended
from tasks.measurement.gates import Bound, Figures, judge
from tasks.measurement.measure import compare, measure
from tasks.measurement.measurement import MeasurementRequest, ReferenceModel, Subject
from tasks.planned_stage import PlannedStage, Result
from tasks.run_context import RunContext
from tasks.runners.executor import EventHandler, Job
from tasks.stage import Artifact, Corpus, Planned, Stage
from tasks.stage_tracking import fail_stage_run, finish_stage_run, log_series, open_stage_run
from tasks.store.identity import seed_of
from tasks.store.store import Entry, publish, unpublish
from tasks.tracking.calls import COMPUTED


class GateFailed(Exception):
    """A stage whose bounds or gates do not hold: its content is kept, but it is not published and no stage builds on it."""


def run_stage(context: RunContext, stage: PlannedStage) -> Result:
    """Run a stage to its end, and log it in MLflow.

    Returns:
        Its result, which `context.results` has from the beginning.

    Raises:
        GateFailed: A bound or gate does not hold.
        Cancelled: The executor was closed.
        Exception: It failed for another reason.
    """
    result, previous = _register(context, stage)
    try:
        open_stage_run(context, stage, result, previous)
        if stage.definition is None:
            result.state, result.path, result.content = "Cached", str(context.base.path), context.base.content
            result.warnings += context.base.warnings
        else:
            _compute(context, stage, stage.definition, result, recompute=stage.recompute and not (previous and previous.path))
        _measure(context, stage, result)
        _judge(context, stage, result)
        if stage.definition is not None:
            publish(Path(result.path), context.outputs, context.name, stage.name)
    except BaseException as error:
        result.state = "Stopped" if isinstance(error, Cancelled) else "Failed"
        result.reason = redacted(str(error)) or type(error).__name__
        if isinstance(error, GateFailed):
            unpublish(context.outputs, context.name, stage.name)
            log_series(context, stage, result)  # the charts must show where the quality was lost
        fail_stage_run(context, stage, result)
        raise
    finally:
        context.progress(stage.name, {"ended": result.state})
    finish_stage_run(context, stage, result)
    return result


def _register(context: RunContext, stage: PlannedStage) -> tuple[Result, Result | None]:
    """Add a new result of the stage to the run's; return it, and that of the previous attempt."""
    result = Result(stage.name, stage.uses, list(dict.fromkeys(stage.inputs.values())), "Running", identity=stage.identity)
    with context.lock:
        previous = context.results.get(stage.name)
        context.results[stage.name] = result
    return result, previous


def _compute(context: RunContext, stage: PlannedStage, definition: Stage, result: Result, recompute: bool) -> None:
    """Take the content from the store, or compute and commit it; `recompute`: even if the store has it."""
    store = context.store
    with store.lock(stage.identity, _announce_waiting(context, stage)):
        stored = store.get(stage.identity)
        entry = None if recompute else stored
        if entry is None:
            result.computed = True
            entry = _compute_in_child(context, stage, definition, result)
            context.tracking.log(result.run, {}, tags={COMPUTED: "true"})  # now: measuring or a gate may fail
    # only now: if the run is killed, its journal must say how far the stage came
    result.state = "Completed" if result.computed else "Cached"
    result.path, result.content = str(entry.path), entry.content
    result.metrics |= entry.manifest["metrics"] | {"seconds": entry.manifest["seconds"]}
    result.warnings = list(entry.manifest["warnings"])
    if stored is not None and stored.content != entry.content:
        result.warnings.append(_changed_bytes_warning(stage, stored, entry))
    result.curves = [(step, values) for step, values in entry.manifest["curves"]]
    result.seconds = entry.manifest["seconds"]
    if not result.computed:
        context.tracking.log_curve(result.run, result.curves)


def _changed_bytes_warning(stage: PlannedStage, old: Entry, new: Entry) -> str:
    before, after = old.manifest["files"], new.manifest["files"]
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return (
        f"ITS BYTES ARE NOT THOSE OF BEFORE, though the same identity promises the same bytes: {', '.join(changed[:5])} "
        f"(content {old.content[:12]}, now {new.content[:12]}). The new result replaces the old one, which is in damaged/ of the store; "
        f"`--from {stage.name}` recomputes what follows it"
    )


def _announce_waiting(context: RunContext, stage: PlannedStage) -> Callable[[], bool]:
    """Return an `is_cancelled` that warns once that the stage waits: its first call means that another run holds the lock."""
    announced = False

    def is_cancelled() -> bool:
        nonlocal announced
        if not announced:
            announced = True
            context.progress(stage.name, {"warning": "waits for another run, which computes it"})
        return context.executor.closed

    return is_cancelled


def _compute_in_child(context: RunContext, stage: PlannedStage, definition: Stage, result: Result) -> Entry:
    """Compute the stage in a child process, complete an artifact, and commit the content."""
    home = context.store.workplace(stage.identity)
    curves: list[tuple[int, dict[str, float]]] = []
    _require_inputs(context, stage)
    try:
        child_result = context.executor.run(_job(context, stage, definition, home), home, _event_handler(context, stage, result, curves))
    except Exception as error:
        context.store.workplace(stage.identity)  # empties `out`, which may have filled the disk: the journal needs space
        if not isinstance(error, Cancelled):
            _require_inputs(context, stage)  # a lost input is the true reason
        raise
    _require_sources(context, stage, definition)
    if isinstance(stage.product, Artifact):
        ancestors = [context.documents[name] for name in stage.ancestors[1:]]  # without the base
        complete_artifact(home / "out", stage.product, stage.document, stage.identity, ancestors, context.base)
    context.tracking.log_curve(result.run, curves)
    return context.store.commit(
        stage.identity,
        stage.document,
        metrics=child_result.metrics,
        seconds=child_result.seconds,
        warnings=result.warnings,
        curves=curves,
    )


def _job(context: RunContext, stage: PlannedStage, definition: Stage, home: Path) -> Job:
    paths = {role: context.results[name].path for role, name in stage.inputs.items()}
    paths |= {role: str(model.path) for role, model in stage.outside.items()}
    origin = asdict(origin_of(context.base)) if isinstance(stage.product, Artifact) else None
    return Job(
        "tasks.runners.jobs:compute_stage",
        {
            "stage": definition.model_dump(mode="json"),
            "inputs": {"parent": paths.pop("parent"), "others": paths, "origin": origin},
            "place": {"out": str(home / "out"), "work": str(home / "work"), "shared": str(context.store.root / "shared")},
            "data": context.data.model_dump(mode="json"),
        },
        context.machine.threads,
        seed_of(stage.identity),
        context.machine.device,
        stage.timeout,
        name=stage.name,
        memory=stage.memory,
        devices=definition.distributed.processes if isinstance(definition, TrainingStage) and definition.distributed else 1,
        variables=stage.job_variables,
        order=stage.index,
    )


def _event_handler(context: RunContext, stage: PlannedStage, result: Result, curves: list[tuple[int, dict[str, float]]]) -> EventHandler:
    """Return a handler that collects the warnings and the curve of a child, and passes on its progress and metrics."""

    def on_event(event: dict[str, Any]) -> None:
        if "warning" in event:
            result.warnings.append(redacted(event["warning"]))
        elif "metrics" in event:
            curves.append((event["step"], event["metrics"]))
            context.tracking.log_live(result.run, event["step"], event["metrics"])
        elif "system" in event:
            context.tracking.log_system(result.run, event["system"], event["time"])
        elif "restarted" in event:
            result.warnings.clear()
            curves.clear()
            context.progress(stage.name, {"warning": event["restarted"]})
        elif "note" in event:
            context.progress(stage.name, {"warning": event["note"]})
        else:
            context.progress(stage.name, event)

    return on_event


def _require_inputs(context: RunContext, stage: PlannedStage) -> None:
    """Raise EdgepressError when an input was removed or damaged since its own stage ended: the result would not have this identity."""
    for name in dict.fromkeys(stage.inputs.values()):
        identity = context.results[name].identity
        if identity == context.base.identity:
            continue  # it is not in the store; `_require_sources` checks it
        with context.store.lock(identity, lambda: context.executor.closed):
            lost = context.store.get(identity) is None
        if lost:
            raise EdgepressError(
                f"the result of {name} ({identity[:12]}) was removed from the store, or damaged and quarantined, during this run; "
                "the same command computes it again"
            )


def _require_sources(context: RunContext, stage: PlannedStage, definition: Stage) -> None:
    """Raise EdgepressError when models or data outside of the store changed since the plan: the result may be of either."""
    models = [*stage.outside.values(), *([context.base] if context.base.identity in stage.document["inputs"].values() else [])]
    changed = [f"the model {model.source}" for model in models if not is_unchanged(model, context.store.root)]
    part = definition.data_read()
    if part != "nothing" and fingerprint(context.data, part) != stage.document["data"]:
        changed.append("the recipe's data")
    if changed:
        shutil.rmtree(context.store.workplace(stage.identity), ignore_errors=True)  # its checkpoints are of other bytes too
        raise EdgepressError(f"{' and '.join(changed)} changed during this run; the same command plans with the current state")


def _measure(context: RunContext, stage: PlannedStage, result: Result) -> None:
    """Measure quality, speed and size; of a corpus, which no runtime opens, only the size."""
    if isinstance(stage.product, Corpus):
        result.metrics |= _static_metrics(result.path, stage.product)
        return
    result.runtime = runtime_name(Path(result.path))
    parent = stage.inputs.get("parent", "")
    compared = {role: context.results["base" if role == "base" else parent] for role in stage.roles}
    references = {role: ReferenceModel(Path(other.path), other.content) for role, other in compared.items()}

    def on_event(event: dict[str, Any]) -> None:
        if "warning" in event:
            result.warnings.append(redacted(event["warning"]))
        elif note := event.get("restarted") or event.get("note"):
            context.progress(stage.name, {"warning": note})
        elif "progress" in event:
            context.progress(stage.name, event)

    request = MeasurementRequest(stage.product, stage.roles, context.data, context.evaluation)
    subject = Subject(request, ReferenceModel(Path(result.path), result.content), references, context.base.path, context.machine)
    measured = measure(subject, context.store, context.executor, on_event, remeasure=context.remeasure, order=stage.index)
    context.measured[stage.name] = measured
    result.metrics |= measured.metrics | _static_metrics(result.path, stage.product)
    result.details = measured.details
    result.measure_seconds = measured.seconds
    if stage.definition is not None:
        result.metrics |= compare(measured, context.measured["base"], result.content, context.store)
    elif measured.seconds:
        result.state = "Completed"
        context.tracking.log(result.run, {}, tags={COMPUTED: "true"})
    if share := most_contended(measured.metrics):
        result.warnings.append(
            f"timed while other programs had the cores (it waited for one {share:.1f} times as long as it was timed): it may be faster than this says; "
            "`edgepress run --remeasure` takes all timings again"
        )
    if parent:
        _compare_speed(result, context.results[parent])


def _static_metrics(path: str, planned: Planned) -> dict[str, float]:
    """Return the metrics of the files alone. The `adapter/` of a checkpoint is an artifact of its own and does not count."""
    metrics = {"size_mb": sum(f.stat().st_size for f in Path(path).iterdir() if f.is_file()) / 1e6}
    if isinstance(planned, Checkpoint):
        metrics["parameters"] = float(planned.num_parameters)
    return metrics


def _compare_speed(result: Result, parent: Result) -> None:
    """Warn of a model that is slower than its parent, each in its runtime, by more than a tenth and beyond the noise of both."""
    speed, before = result.metrics.get("tokens_per_second"), parent.metrics.get("tokens_per_second")
    if not speed or not before or speed >= 0.9 * before:
        return
    as_fast = {"tokens_per_second": Bound(max_decrease=0, relative_to="parent")}
    if [v.outcome for v in judge(as_fast, Figures(result.metrics), {"parent": Figures(parent.metrics)})] == ["FAIL"]:
        result.warnings.append(
            f"slower than its parent {parent.name}: {speed:.0f} tokens/s in {result.runtime} against {before:.0f} in {parent.runtime} "
            f"({1 - speed / before:.0%} less)"
        )


def _judge(context: RunContext, stage: PlannedStage, result: Result) -> None:
    """Judge the bounds of an export's proof and the recipe's gates. Raises GateFailed where one does not hold."""
    others = {name: _figures(context, name) for name in (*stage.ancestors, stage.name)}
    if "parent" in stage.inputs:
        others["parent"] = others[stage.inputs["parent"]]
    result.verdicts = [verdict for bounds in (stage.bounds, stage.gates) for verdict in judge(bounds, others[stage.name], others)]
    broken = [verdict.message for verdict in result.verdicts if verdict.outcome == "FAIL"]
    if broken:
        raise GateFailed("; ".join(broken))


def _figures(context: RunContext, name: str) -> Figures:
    measured = context.measured.get(name)  # nothing is measured of a corpus
    return Figures(context.results[name].metrics, measured.items if measured else {})


def is_transient(error: BaseException) -> bool:
    """Return whether a retry can help: after a lost process, never after an error of the user or a failed gate."""
    return bool(getattr(error, "transient", False)) and not isinstance(error, EdgepressError | GateFailed)
