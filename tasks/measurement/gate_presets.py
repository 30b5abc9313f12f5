"""Gates by name, and which stages a key of `gates:` is about. Imports no torch."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BeforeValidator

from compression.errors import nearest
from tasks.measurement.gates import Bound

LEAF = "leaf"  # as a key of `gates:` every stage that nothing follows

PRESETS: Mapping[str, Mapping[str, Bound]] = {
    # right after pruning, where figures say little about what training will bring back: only what is broken
    "loose": {"perplexity": Bound(max_increase=9.0, if_measured=True)},
    # at the end: what is shipped is about as good as what it came from
    "strict": {"perplexity": Bound(max_increase=0.1, if_measured=True), "accuracy": Bound(max_drop=0.02, if_measured=True)},
}
SELECTIONS: Mapping[str, Mapping[str, str]] = {"default": {"prune.*": "loose", LEAF: "strict"}}
"""What `preset:` at the top of `gates:` stands for: presets by key."""

StageGates = dict[str, Bound]


def gate_key(gates: Mapping[str, StageGates], name: str, uses: str, leaf: bool) -> str | None:
    """The one key of `gates:` that holds for a stage: its name, or `leaf` where nothing follows it, or the longest pattern that its kind fits."""
    if name in gates:
        return name
    if leaf and LEAF in gates:
        return LEAF
    return max((key for key in gates if is_pattern(key) and fnmatchcase(uses, key)), key=len, default=None)


def is_pattern(key: str) -> bool:
    """Whether a key of `gates:` means kinds (`prune.*`): no stage can be called so."""
    return "*" in key


def _expanded(gates: Any) -> Any:
    """Presets replaced by what they stand for: a whole selection (`preset: default`), a stage's (`tuned: strict`), a stage's beside bounds of its own."""
    if not isinstance(gates, Mapping):
        return gates
    given = {key: _of_stage(key, value) for key, value in gates.items() if key != "preset"}
    if "preset" not in gates:
        return given
    selection = SELECTIONS[_known("preset", gates["preset"], SELECTIONS)]
    return {key: dict(PRESETS[preset]) for key, preset in selection.items()} | given


def _of_stage(key: str, value: Any) -> Any:
    if isinstance(value, str):
        return dict(PRESETS[_known(key, value, PRESETS)])
    if isinstance(value, Mapping) and "preset" in value:
        own = {metric: bound for metric, bound in value.items() if metric != "preset"}
        return {**PRESETS[_known(f"{key}.preset", value["preset"], PRESETS)], **own}
    return value


def _known(key: str, word: Any, presets: Mapping[str, Any]) -> str:
    if isinstance(word, str) and word in presets:
        return word
    raise ValueError(f"{key}: there is no preset {word!r}{nearest(str(word), presets)}; presets: {', '.join(presets)}")


Gates = Annotated[dict[str, StageGates], BeforeValidator(_expanded, json_schema_input_type=dict[str, str | dict[str, Bound | str]])]
"""The recipe's `gates:`, presets expanded."""
