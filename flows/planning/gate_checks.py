"""Check gates and bounds while planning: each must name an existing stage, a metric measured of it, and an earlier stage. Imports no torch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from compression.checkpoints.checkpoint import Checkpoint
from compression.data import DataSpec
from compression.errors import EdgepressError, nearest
from flows.planning.nodes import BASE, Node
from flows.planning.recipe import ParsedRecipe
from tasks.measurement.figures import DERIVED_SUFFIXES
from tasks.measurement.gate_presets import LEAF, PRESETS, is_pattern
from tasks.measurement.gates import Bound
from tasks.measurement.measure import known_metrics
from tasks.measurement.measurement import MeasurementRequest
from tasks.planned_stage import PlannedStage
from tasks.stage import Corpus, stage_kinds

_PRESET_METRICS = {metric for bounds in PRESETS.values() for metric in bounds}


def check_gates(parsed: ParsedRecipe, stages: Mapping[str, PlannedStage], settings: Any) -> None:
    """Refuse a gate, or a bound of a stage, that could never be judged.

    Args:
        parsed: The recipe.
        stages: Its planned stages by name.
        settings: The recipe's `evaluation`, which decides what is measured.

    Raises:
        EdgepressError: With file, line and key.
    """
    _check_keys(parsed)
    measured = {name: metrics_of(stage, parsed.recipe.data, settings) for name, stage in stages.items()}
    _check_bounds(stages[BASE].gates, stages[BASE], measured, partial(_gate_error, parsed, BASE))
    for node in parsed.nodes:
        stage = stages[node.name]
        _check_bounds(stage.gates, stage, measured, partial(_gate_error, parsed, node.gated_by))
        _check_bounds(node.execution.bounds, stage, measured, partial(_bound_error, parsed, node))


def _gate_error(parsed: ParsedRecipe, key: str, metric: str, message: str) -> EdgepressError:
    return parsed.error(("gates", key, metric), message)


def _bound_error(parsed: ParsedRecipe, node: Node, metric: str, message: str) -> EdgepressError:
    return parsed.stage_error(node, ("bounds", metric), message)


def _check_keys(parsed: ParsedRecipe) -> None:
    stages = [BASE, *parsed.recipe.stages]
    for key in parsed.recipe.gates:
        if is_pattern(key):
            if not any(fnmatchcase(uses, key) for uses in stage_kinds()):
                raise parsed.error(("gates", key), f"no kind of stage matches this pattern; kinds: {', '.join(stage_kinds())}")
        elif key == LEAF:
            if LEAF in stages:
                raise parsed.error(("gates", key), f"{LEAF!r} means every stage that nothing follows, and a stage has this name: rename it")
        elif key not in stages:
            known = [*stages, LEAF]
            raise parsed.error(
                ("gates", key),
                f"there is no stage {key!r}{nearest(key, known)}; stages: {', '.join(stages)}; or {LEAF}, or a pattern like prune.*",
            )


def metrics_of(stage: PlannedStage, data: DataSpec, settings: Any) -> tuple[str, ...]:
    """Return the names of all metrics a stage will have; `*` in a name stands for a part that only the result shows."""
    names = ["size_mb"]
    if isinstance(stage.product, Checkpoint):
        names.append("parameters")
    if stage.definition is not None:
        names += ["seconds", *stage.definition.metrics]
    if not isinstance(stage.product, Corpus):
        names += known_metrics(MeasurementRequest(stage.product, stage.roles, data, settings))
    return tuple(names)


def _check_bounds(
    bounds: Mapping[str, Bound],
    stage: PlannedStage,
    measured: Mapping[str, tuple[str, ...]],
    error: Callable[[str, str], EdgepressError],
) -> None:
    metrics = measured[stage.name]
    for metric, bound in bounds.items():
        other = stage.inputs.get("parent", "") if bound.relative_to == "parent" else bound.relative_to
        choices = [*stage.ancestors, *(["parent"] if stage.inputs else [])]
        if (bound.relative or stage.ancestors) and bound.relative_to not in choices:
            listed = ", ".join(choices) or "nothing precedes the base"
            raise error(metric, f"relative_to {bound.relative_to!r} is not a stage before this one: {listed}")
        if bound.if_measured and (metric in _PRESET_METRICS or any(_in(metric, names) for names in measured.values())):
            continue
        if not _in(metric, metrics):
            hint = nearest(metric, [name for name in metrics if not name.endswith(("_low", "_high"))])
            raise error(metric, f"there is no metric {metric!r} of {stage.name}{hint}; it has {', '.join(_main_metrics(metrics))}")
        if bound.relative and not _in(metric, measured[other]):
            raise error(metric, f"{metric!r} is not measured of {other}, so that of {stage.name} cannot be relative to it")


def _in(metric: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(metric, name) for name in names)


def _main_metrics(names: Sequence[str]) -> list[str]:
    """The metrics without intervals, differences, counts and parts of others (`refusal_rate`, not `refusal_rate.fraud`)."""
    return [name for name in names if not name.endswith(DERIVED_SUFFIXES) and not any(name.startswith(f"{other}.") for other in names)]


def gate_lines(parsed: ParsedRecipe, stages: Mapping[str, PlannedStage]) -> list[str]:
    """Write each stage's gates out, presets too: `tuned: accuracy at most 0.02 below base`. Copies of a stage share one line."""
    gated = {BASE: stages[BASE].gates} if BASE in stages else {}
    for node in parsed.nodes:
        if node.name in stages:
            gated.setdefault(node.origin, stages[node.name].gates)
    return [
        f"{stage}: {'; '.join(f'{metric} {bound.requirement()}' for metric, bound in bounds.items())}"
        for stage, bounds in gated.items()
        if bounds
    ]
