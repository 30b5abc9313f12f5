"""What happens to one stage, whoever schedules it: ask the store, compute in a child, measure, judge, publish, log. Imports no torch."""

import shutil
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compression.checkpoints.checkpoint import Checkpoint
from compression.data import DataSpec, fingerprint
from compression.errors import EdgepressError
from compression.redaction import redacted
from export.runtimes import runtime_name
from tasks.artifact import complete_artifact, origin_of
from tasks.base import Base, is_unchanged
from tasks.errors import Cancelled
from tasks.kinds._training import TrainingStage
from tasks.measurement.figures import most_contended
from tasks.measurement.gates import Bound, Figures, judge
from tasks.measurement.measure import Measured, compare, measure
from tasks.measurement.measurement import MeasurementRequest, ReferenceModel, Subject
from tasks.planned_stage import PlannedStage, Result
from tasks.runners.executor import Executor, Job
from tasks.stage import Artifact, Corpus, Planned, Stage
from tasks.store.identity import Machine, seed_of
from tasks.store.provenance import CARRIED
from tasks.store.store import Entry, Store, publish, unpublish
from tasks.tracking.calls import COMPUTED
from tasks.tracking.descriptions import charted, describe_stage, properties
from tasks.tracking.runs_view import RUN
from tasks.tracking.tracking import Tracking


class GateFailed(Exception):
    """A stage whose bounds or gates do not hold: its content is kept, but neither published nor built upon."""


@dataclass
class RunContext:
    """Everything the stages of one run share."""

    name: str
    store: Store
    executor: Executor
    tracking: Tracking
    run: str  # the parent run in MLflow
    data: DataSpec
    machine: Machine
    base: Base
    outputs: Path
    documents: dict[str, tuple[str, dict[str, Any]]]  # identity and its document, by stage
    progress: Callable[[str, dict[str, Any]], None]
    run_name: str = ""  # tag of all its runs in MLflow (tasks/tracking/runs_view.py)
    evaluation: Any = None  # the recipe's settings of optional measurements
    remeasure: bool = False  # take timings again even if the store has them
    cells: Mapping[str, str] = field(default_factory=dict)  # runs in MLflow of a sweep's cells, by name
    known_runs: Mapping[str, str] = field(default_factory=dict)  # runs in MLflow of stages that the resumed run began, by name
    superseded: Mapping[str, str] = field(default_factory=dict)  # such runs of stages that have another identity now
    series: Mapping[str, Sequence[str]] = field(default_factory=dict)  # what names of a stage's metrics end with on the parent run
    leaves: Collection[str] = ()  # stages that nothing follows
    results: dict[str, Result] = field(default_factory=dict)
    measured: dict[str, Measured] = field(default_factory=dict)  # by stage
    lock: threading.Lock = field(default_factory=threading.Lock)


def run_stage(context: RunContext, stage: PlannedStage) -> Result:
    """Bring a stage to its end and return its result. Raises what made it fail, after logging the reason."""
    result, before = _register(context, stage)
    try:
        _open_run(context, stage, result, before)
        if stage.definition is None:
            entry = ReferenceModel(context.base.path, context.base.content)
            result.state, result.path, result.content = "Cached", str(entry.path), entry.content
            result.warnings += context.base.warnings
        else:
            _compute(context, stage, stage.definition, result, again=stage.recompute and not (before and before.path))
        _measure(context, stage, result)
        _judge(context, stage, result)
        if stage.definition is not None:
            publish(Path(result.path), context.outputs, context.name, stage.name)
    except BaseException as error:
        stopped = isinstance(error, Cancelled)
        result.state, result.reason = "Stopped" if stopped else "Failed", redacted(str(error)) or type(error).__name__
        if isinstance(error, GateFailed):
            unpublish(context.outputs, context.name, stage.name)
            _log_series(context, stage, result)  # where quality went is asked most of what failed
        if result.run:
            context.tracking.log(result.run, result.metrics, tags={"edgepress.state": result.state, **_place_tags(result)})
            context.tracking.describe(result.run, _description(context, stage, result))
            context.tracking.end(result.run, "KILLED" if stopped else "FAILED", "interrupted" if stopped else result.reason)
        raise
    finally:
        context.progress(stage.name, {"ended": result.state})
    _log(context, stage, result)
    return result


def _register(context: RunContext, stage: PlannedStage) -> tuple[Result, Result | None]:
    """The stage's result, from now on among the pipeline's, and that of the attempt before."""
    uses = stage.definition.uses if stage.definition else "base"
    result = Result(stage.name, uses, list(dict.fromkeys(stage.inputs.values())), "Running", identity=stage.identity)
    with context.lock:
        before = context.results.get(stage.name)
        context.results[stage.name] = result
    return result, before


def _open_run(context: RunContext, stage: PlannedStage, result: Result, before: Result | None) -> None:
    """Open the stage's MLflow run; a stage that is tried again, or was begun by the run that is resumed, continues its run."""
    if before is not None and before.run:
        result.run = before.run
        context.tracking.reopen(result.run)
    else:
        tags = {
            "edgepress.kind": "stage",
            "edgepress.stage": stage.name,
            "edgepress.uses": result.uses,
            "edgepress.identity": stage.identity,
            "edgepress.recipe": context.name,
            RUN: context.run_name,
            "edgepress.leaf": str(stage.name in context.leaves).lower(),
            **properties(stage.product, context.base.checkpoint.model_type),
        }
        params = {
            "uses": result.uses,
            **(stage.definition.model_dump(mode="json", exclude={"uses"}) if stage.definition else {}),
            "seed": stage.document.get("seed"),
        }
        result.run = context.tracking.open_run(
            stage.name,
            parent=context.cells.get(stage.cell, context.run),
            tags=tags,
            params=params,
            known=context.known_runs.get(stage.name),
        )
        if old := context.superseded.get(stage.name):
            context.tracking.supersede(old, by=result.run)
        if stage.document.get("data"):
            context.tracking.log_data(
                result.run,
                "recipe data",
                stage.document["data"],
                context.data.model_dump_json(),
                stage.definition.data_read() if stage.definition else "evaluation",
            )


def _compute(context: RunContext, stage: PlannedStage, definition: Stage, result: Result, again: bool) -> None:
    """The stage's content: from the store, or computed in a child and committed. `again`: computed whatever the store has."""
    store = context.store
    with store.lock(stage.identity, _waiting(context, stage)):
        found = store.get(stage.identity)
        entry = None if again else found
        cached = entry is not None
        if entry is None:
            result.computed = True
            entry = _run_child(context, stage, definition, result)
            context.tracking.log(result.run, {}, tags={COMPUTED: "true"})  # so it stays, whatever comes of measuring and of gates
    result.state = "Cached" if cached else "Completed"  # not before: the journal of a run that is killed says how far it came
    result.path, result.content = str(entry.path), entry.content
    result.metrics |= entry.manifest["metrics"] | {"seconds": entry.manifest["seconds"]}
    result.warnings = list(entry.manifest["warnings"])
    if found is not None and found.content != entry.content:
        result.warnings.append(_other_bytes(stage, found, entry))
    result.curves = [(step, values) for step, values in entry.manifest["curves"]]
    result.seconds = entry.manifest["seconds"]
    if cached:
        context.tracking.log_curve(result.run, result.curves)


def _other_bytes(stage: PlannedStage, old: Entry, new: Entry) -> str:
    """What to say of a stage that gave other bytes under the same identity, which promises equal ones."""
    files = {
        name
        for name in old.manifest["files"].keys() | new.manifest["files"].keys()
        if old.manifest["files"].get(name) != new.manifest["files"].get(name)
    }
    return (
        f"ITS BYTES ARE NOT THOSE OF BEFORE, and the same identity promises the same: {', '.join(sorted(files)[:5])} "
        f"(content {old.content[:12]}, now {new.content[:12]}). The new result took the place of the old one, which is in damaged/ of the store; "
        f"`--from {stage.name}` makes what follows of it anew"
    )


def _waiting(context: RunContext, stage: PlannedStage) -> Callable[[], bool]:
    """What is asked while another run holds the stage: whether this one was stopped. Says once that it waits."""
    said = False

    def is_cancelled() -> bool:
        nonlocal said
        if not said:
            said = True
            context.progress(stage.name, {"warning": "waits for another run, which computes it"})
        return context.executor.closed

    return is_cancelled


def _run_child(context: RunContext, stage: PlannedStage, definition: Stage, result: Result) -> Entry:
    paths = {role: context.results[name].path for role, name in stage.inputs.items()}
    paths |= {role: str(model.path) for role, model in stage.outside.items()}
    home = context.store.workplace(stage.identity)
    arguments = {
        "stage": definition.model_dump(mode="json"), "parent": paths.pop("parent"), "others": paths, "out": str(home / "out"),
        "work": str(home / "work"), "data": context.data.model_dump(mode="json"),
        "shared": str(context.store.root / "shared"),
    }  # fmt: skip
    if isinstance(stage.product, Artifact):
        arguments["origin"] = asdict(origin_of(context.base))
    devices = definition.distributed.processes if isinstance(definition, TrainingStage) and definition.distributed else 1
    job = Job(
        "tasks.runners.jobs:compute_stage", arguments, context.machine.threads, seed_of(stage.identity), context.machine.device, stage.timeout,
        name=stage.name, memory=stage.memory, devices=devices, variables=stage.job_variables, order=stage.index,
    )  # fmt: skip
    curves: list[tuple[int, dict[str, float]]] = []

    def on_event(event: dict[str, Any]) -> None:
        if "warning" in event:
            result.warnings.append(redacted(event["warning"]))
        elif "metrics" in event:
            curves.append((event["step"], event["metrics"]))
            context.tracking.log_live(result.run, event["step"], event["metrics"])
        elif "system" in event:
            context.tracking.log_system(result.run, event["system"], event["time"])
        elif "again" in event:
            result.warnings.clear()
            curves.clear()
            context.progress(stage.name, {"warning": event["again"]})
        elif "note" in event:
            context.progress(stage.name, {"warning": event["note"]})
        else:
            context.progress(stage.name, event)

    _require_inputs(context, stage)
    try:
        done = context.executor.run(job, home, on_event)
    except Exception as error:
        context.store.workplace(stage.identity)  # its `out` empty again: the disk may be full of it, and the journal must go on
        if not isinstance(error, Cancelled):
            _require_inputs(context, stage)  # where one is lost, that is the reason
        raise
    _require_sources(context, stage, definition)
    if isinstance(stage.product, Artifact):
        ancestors = [context.documents[name] for name in stage.ancestors[1:]]  # after the base
        complete_artifact(home / "out", stage.product, stage.document, stage.identity, ancestors, context.base)
    context.tracking.log_curve(result.run, curves)
    return context.store.commit(
        stage.identity, stage.document, metrics=done.metrics, seconds=done.seconds, warnings=result.warnings, curves=curves
    )


def _require_inputs(context: RunContext, stage: PlannedStage) -> None:
    """Raises EdgepressError when an input was removed or damaged since its own stage ended: what is made of it would not be of this identity."""
    for name in dict.fromkeys(stage.inputs.values()):
        identity = context.results[name].identity
        if identity == context.base.identity:
            continue  # not in the store: `_require_sources` looks at it
        with context.store.lock(identity, lambda: context.executor.closed):
            lost = context.store.get(identity) is None
        if lost:
            raise EdgepressError(
                f"the result of {name} ({identity[:12]}) was removed from the store, or damaged and set aside, while this run was going on; "
                "the same command computes it again"
            )


def _require_sources(context: RunContext, stage: PlannedStage, definition: Stage) -> None:
    """Raises EdgepressError when what the stage read outside of the store is no longer what was planned with: its result may be of either."""
    models = [*stage.outside.values(), *([context.base] if context.base.identity in stage.document["inputs"].values() else [])]
    changed = [f"the model {model.source}" for model in models if not is_unchanged(model, context.store.root)]
    read = definition.data_read()
    if read != "nothing" and fingerprint(context.data, read) != stage.document["data"]:
        changed.append("the recipe's data")
    if changed:
        shutil.rmtree(context.store.workplace(stage.identity), ignore_errors=True)  # what it would go on from is of other bytes too
        raise EdgepressError(f"{' and '.join(changed)} changed while this run was going on; the same command plans with what is there now")


def _measure(context: RunContext, stage: PlannedStage, result: Result) -> None:
    """Quality, speed and size; of a corpus, which no runtime opens, the size."""
    if isinstance(stage.product, Corpus):
        result.metrics |= _static(result.path, stage.product)
        return
    result.runtime = runtime_name(Path(result.path))
    parent = stage.inputs.get("parent", "")
    compared = {role: context.results["base" if role == "base" else parent] for role in stage.roles}
    references = {role: ReferenceModel(Path(other.path), other.content) for role, other in compared.items()}

    def on_event(event: dict[str, Any]) -> None:
        if "warning" in event:
            result.warnings.append(redacted(event["warning"]))
        elif told := event.get("again") or event.get("note"):
            context.progress(stage.name, {"warning": told})
        elif "progress" in event:
            context.progress(stage.name, event)

    request = MeasurementRequest(stage.product, stage.roles, context.data, context.evaluation)
    subject = Subject(request, ReferenceModel(Path(result.path), result.content), references, context.base.path, context.machine)
    measured = measure(subject, context.store, context.executor, on_event, remeasure=context.remeasure, order=stage.index)
    context.measured[stage.name] = measured
    result.metrics |= measured.metrics | _static(result.path, stage.product)
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


def _static(path: str, planned: Planned) -> dict[str, float]:
    """What the files alone say. A checkpoint's `adapter/` is an artifact of its own and not counted."""
    metrics = {"size_mb": sum(f.stat().st_size for f in Path(path).iterdir() if f.is_file()) / 1e6}
    if isinstance(planned, Checkpoint):
        metrics["parameters"] = float(planned.num_parameters)
    return metrics


def _compare_speed(result: Result, parent: Result) -> None:
    """Warn of a stage that made the model slower than its parent, each in its runtime: by more than a tenth, and beyond the noise of both."""
    mine, theirs = result.metrics.get("tokens_per_second"), parent.metrics.get("tokens_per_second")
    if not mine or not theirs or mine >= 0.9 * theirs:
        return
    as_fast = {"tokens_per_second": Bound(max_decrease=0, relative_to="parent")}
    if [v.outcome for v in judge(as_fast, Figures(result.metrics), {"parent": Figures(parent.metrics)})] == ["FAIL"]:
        result.warnings.append(
            f"slower than its parent {parent.name}: {mine:.0f} tokens/s in {result.runtime} against {theirs:.0f} in {parent.runtime} "
            f"({1 - mine / theirs:.0%} less)"
        )


def _judge(context: RunContext, stage: PlannedStage, result: Result) -> None:
    """Judge the bounds of an export's proof and the recipe's gates; raises GateFailed for what does not hold."""
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


def _log(context: RunContext, stage: PlannedStage, result: Result) -> None:
    """Metrics on the stage's run, and on the parent with step = the stage's index, one series for each path to a leaf; then end the run."""
    passed = all(verdict.outcome == "PASS" for verdict in result.verdicts)
    tags = {
        "edgepress.state": result.state, "edgepress.cached": str(result.state == "Cached").lower(), **_place_tags(result),
        "edgepress.final": str(stage.name in context.leaves and passed).lower(),
    }  # fmt: skip
    tracking = context.tracking
    tracking.log(result.run, result.metrics, tags=tags)
    _log_series(context, stage, result)
    if isinstance(stage.product, Artifact):
        for file in CARRIED:
            tracking.log_file(result.run, Path(result.path) / file)
    tracking.describe(
        result.run, _description(context, stage, result), cached_identity=stage.identity if result.state == "Cached" else None
    )
    tracking.end(result.run, "FINISHED")


def _log_series(context: RunContext, stage: PlannedStage, result: Result) -> None:
    """The stage's place in the charts of the pipeline's run."""
    suffixes = context.series.get(stage.name, ())
    series = {metric + suffix: value for metric, value in charted(result.metrics).items() for suffix in suffixes}
    if series:  # what a stage of another identity left at this step is not true any more
        context.tracking.log(context.run, series, step=stage.index, again=stage.name in context.superseded)


def _place_tags(result: Result) -> dict[str, str]:
    """Where its bytes are and what they are, of a result that has some."""
    return {"edgepress.path": result.path, "edgepress.content": result.content} if result.path else {}


def _description(context: RunContext, stage: PlannedStage, result: Result) -> str:
    parent = stage.inputs.get("parent", "base")
    others = [name for name in dict.fromkeys((parent, "base")) if name != stage.name and name in context.results]
    return describe_stage(
        uses=result.uses, needs=result.needs, state=result.state, reason=result.reason, seconds=result.seconds, runtime=result.runtime,
        columns={stage.name: result.metrics, **{name: context.results[name].metrics for name in others}},
        warnings=result.warnings, verdicts=result.verdicts,
    )  # fmt: skip


def is_transient(error: BaseException) -> bool:
    """Whether trying again can help: a lost process, never a mistake of the recipe or a broken bound."""
    return bool(getattr(error, "transient", False)) and not isinstance(error, EdgepressError | GateFailed)
