"""Gates and bounds, looked at while planning: each is about a stage there is, a metric that is measured of it, a stage before it. Imports no torch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from compression.checkpoints.checkpoint import Checkpoint
from compression.data import DataSpec
from compression.errors import EdgepressError
from flows.planning.graph import BASE
from flows.planning.recipe import ParsedRecipe
from flows.planning.source_map import nearest
from tasks.measurement.figures import BESIDE
from tasks.measurement.gate_presets import LEAF, PRESETS, is_pattern
from tasks.measurement.gates import Bound
from tasks.measurement.measure import known_metrics
from tasks.measurement.measurement import MeasurementRequest
from tasks.planned_stage import PlannedStage
from tasks.stage import Corpus, stage_kinds

_PRESET_METRICS = {metric for bounds in PRESETS.values() for metric in bounds}


def check_gates(parsed: ParsedRecipe, stages: Mapping[str, PlannedStage], settings: Any) -> None:
    """Raises EdgepressError with file, line and key for a gate, or a bound of a stage, that could never be judged.

    settings  the recipe's `evaluation`, on which it depends what is measured
    """
    _check_keys(parsed)
    measured = {name: metrics_of(stage, parsed.recipe.data, settings) for name, stage in stages.items()}
    _check_bounds(
        stages[BASE].gates, stages[BASE], measured, lambda metric, text: parsed.error(("gates", BASE, metric), text)
    )  # the base has no entry
    for node in parsed.nodes:
        stage = stages[node.name]

        def gate_mistake(metric: str, text: str, key: str = node.gated_by) -> EdgepressError:
            return parsed.error(("gates", key, metric), text)

        def bound_mistake(metric: str, text: str, node: Any = node) -> EdgepressError:
            return parsed.stage_error(node, ("bounds", metric), text)

        _check_bounds(stage.gates, stage, measured, gate_mistake)
        _check_bounds(node.execution.bounds, stage, measured, bound_mistake)


def _check_keys(parsed: ParsedRecipe) -> None:
    stages = [BASE, *parsed.recipe.stages]
    for key in parsed.recipe.gates:
        if is_pattern(key):
            if not any(fnmatchcase(uses, key) for uses in stage_kinds()):
                raise parsed.error(("gates", key), f"no kind of stage is called like that; kinds: {', '.join(stage_kinds())}")
        elif key == LEAF:
            if LEAF in stages:
                raise parsed.error(("gates", key), f"{LEAF!r} means every stage that nothing follows, and a stage is called so: rename it")
        elif key not in stages:
            known = [*stages, LEAF]
            raise parsed.error(
                ("gates", key),
                f"there is no stage {key!r}{nearest(key, known)}; stages: {', '.join(stages)}; or {LEAF}, or a pattern like prune.*",
            )


def metrics_of(stage: PlannedStage, data: DataSpec, settings: Any) -> tuple[str, ...]:
    """Names of all metrics a stage will have; `*` in one stands for what only the result tells."""
    names = ["size_mb"]
    if isinstance(stage.product, Checkpoint):
        names.append("parameters")
    if stage.definition is not None:
        names += ["seconds", *stage.definition.metrics]
    if not isinstance(stage.product, Corpus):
        names += known_metrics(MeasurementRequest(stage.product, stage.roles, data, settings))
    return tuple(names)


def _check_bounds(
    bounds: Mapping[str, Bound], stage: PlannedStage, measured: Mapping[str, tuple[str, ...]],
    mistake: Callable[[str, str], EdgepressError],
) -> None:  # fmt: skip
    mine = measured[stage.name]
    for metric, bound in bounds.items():
        other = stage.inputs.get("parent", "") if bound.relative_to == "parent" else bound.relative_to
        before = [*stage.ancestors, *(["parent"] if stage.inputs else [])]
        if (bound.relative or stage.ancestors) and bound.relative_to not in before:
            there = ", ".join(before) or "nothing is before the base"
            raise mistake(metric, f"relative_to {bound.relative_to!r} is none of the stages before: {there}")
        if bound.if_measured and (metric in _PRESET_METRICS or any(_in(metric, names) for names in measured.values())):
            continue
        if not _in(metric, mine):
            near = nearest(metric, [name for name in mine if not name.endswith(("_low", "_high"))])
            raise mistake(metric, f"there is no metric {metric!r} of {stage.name}{near}; it has {', '.join(_of_their_own(mine))}")
        if bound.relative and not _in(metric, measured[other]):
            raise mistake(metric, f"{metric!r} is not measured of {other}, so that of {stage.name} cannot be relative to it")


def _in(metric: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(metric, name) for name in names)


def _of_their_own(names: Sequence[str]) -> list[str]:
    """The metrics that stand beside no other: without intervals, differences, counts and parts (`refusal_rate`, not `refusal_rate.fraud`)."""
    return [name for name in names if not name.endswith(BESIDE) and not any(name.startswith(f"{other}.") for other in names)]


def gate_lines(parsed: ParsedRecipe, stages: Mapping[str, PlannedStage]) -> list[str]:
    """What each stage of the recipe must keep, presets written out: `tuned: accuracy at most 0.02 below base`. Copies of a stage stand there once."""
    gated = {BASE: stages[BASE].gates} if BASE in stages else {}
    for node in parsed.nodes:
        if node.name in stages:
            gated.setdefault(node.origin, stages[node.name].gates)
    return [
        f"{stage}: {'; '.join(f'{metric} {b.requirement()}' for metric, b in bounds.items())}" for stage, bounds in gated.items() if bounds
    ]
