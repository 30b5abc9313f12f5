"""Gates by name, and the stages that a key of `gates:` applies to. Imports no torch."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BeforeValidator

from compression.errors import nearest
from tasks.measurement.gates import Bound

LEAF = "leaf"  # the key of `gates:` for every stage that nothing follows

PRESETS: Mapping[str, Mapping[str, Bound]] = {
    # Right after pruning figures say little about what training will recover: fail only what is broken.
    "loose": {"perplexity": Bound(max_increase=9.0, if_measured=True)},
    # At the end: what ships is about as good as its base.
    "strict": {"perplexity": Bound(max_increase=0.1, if_measured=True), "accuracy": Bound(max_drop=0.02, if_measured=True)},
}
SELECTIONS: Mapping[str, Mapping[str, str]] = {"default": {"prune.*": "loose", LEAF: "strict"}}
"""Presets by key, for each name that `preset:` at the top of `gates:` may have."""

StageGates = dict[str, Bound]


def gate_key(gates: Mapping[str, StageGates], name: str, uses: str, leaf: bool) -> str | None:
    """Return the key of `gates:` that applies to a stage: its name, `leaf` where nothing follows it, or the longest pattern that matches its kind."""
    if name in gates:
        return name
    if leaf and LEAF in gates:
        return LEAF
    return max((key for key in gates if is_pattern(key) and fnmatchcase(uses, key)), key=len, default=None)


def is_pattern(key: str) -> bool:
    """Whether a key of `gates:` matches kinds (`prune.*`): no stage's name has a star."""
    return "*" in key


def _expanded(gates: Any) -> Any:
    """Replace presets by their bounds: a selection (`preset: default`), a stage's (`tuned: strict`), or one that a stage's own bounds add to."""
    if not isinstance(gates, Mapping):
        return gates
    chosen = {key: _expanded_stage(key, value) for key, value in gates.items() if key != "preset"}
    if "preset" not in gates:
        return chosen
    selection = _preset("preset", gates["preset"], SELECTIONS)
    return {key: dict(PRESETS[preset]) for key, preset in selection.items()} | chosen


def _expanded_stage(key: str, value: Any) -> Any:
    if isinstance(value, str):
        return dict(_preset(key, value, PRESETS))
    if isinstance(value, Mapping) and "preset" in value:
        bounds = {metric: bound for metric, bound in value.items() if metric != "preset"}
        return {**_preset(f"{key}.preset", value["preset"], PRESETS), **bounds}
    return value


def _preset(key: str, name: Any, presets: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if isinstance(name, str) and name in presets:
        return presets[name]
    raise ValueError(f"{key}: there is no preset {name!r}{nearest(str(name), presets)}; presets: {', '.join(presets)}")


Gates = Annotated[dict[str, StageGates], BeforeValidator(_expanded, json_schema_input_type=dict[str, str | dict[str, Bound | str]])]
"""The recipe's `gates:`, presets expanded."""
