"""Gates by name, and which key of `gates:` holds for a stage."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from tasks.measurement.gate_presets import PRESETS, SELECTIONS, Gates, StageGates, gate_key
from tasks.measurement.gates import Bound

LOOSE, STRICT = dict(PRESETS["loose"]), dict(PRESETS["strict"])


def read(document: Any) -> dict[str, StageGates]:
    return TypeAdapter(Gates).validate_python(document)


def test_preset_becomes_its_bounds() -> None:
    assert read({"tuned": "strict", "pruned": "loose"}) == {"tuned": STRICT, "pruned": LOOSE}
    assert read({"preset": "default"}) == {"prune.*": LOOSE, "leaf": STRICT}
    assert read({}) == {}


def test_own_bounds_override_preset() -> None:
    own = {"accuracy": {"min": 0.5}}
    assert read({"tuned": {"preset": "strict", **own}}) == {"tuned": {**STRICT, "accuracy": Bound(min=0.5)}}
    assert read({"preset": "default", "leaf": own}) == {"prune.*": LOOSE, "leaf": {"accuracy": Bound(min=0.5)}}
    assert read({"preset": "default", "tuned": {}})["tuned"] == {}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"tuned": "stric"}, "tuned: there is no preset 'stric'; did you mean 'strict'?"),
        ({"tuned": {"preset": "default"}}, "tuned.preset: there is no preset 'default'"),
        ({"preset": "strict"}, "preset: there is no preset 'strict'; presets: default"),
        ({"preset": {"accuracy": {"min": 1}}}, "preset: there is no preset"),
        ({"tuned": {"accuracy": "strict"}}, "tuned.accuracy"),
        ("strict", "dict"),
    ],
)
def test_unknown_preset_is_refused(document: Any, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        read(document)
    assert words in str(caught.value)


def test_presets_use_common_metrics() -> None:
    """A recipe without questions has no accuracy, and a preset says nothing of it."""
    assert all(bound.if_measured and bound.relative_to == "base" for bounds in PRESETS.values() for bound in bounds.values())
    assert {preset for selection in SELECTIONS.values() for preset in selection.values()} <= PRESETS.keys()


@pytest.mark.parametrize(
    ("name", "uses", "leaf", "key"),
    [
        ("pruned", "prune.width", False, "prune.*"),
        ("narrow", "prune.width", False, "narrow"),
        ("thin", "prune.depth", True, "leaf"),
        ("thin", "prune.depth", False, "prune.d*"),
        ("gguf", "export.gguf", True, "leaf"),
        ("gptq", "quantize.gptq", False, None),
    ],
)
def test_one_key_applies_to_stage(name: str, uses: str, leaf: bool, key: str | None) -> None:
    gates: dict[str, StageGates] = {"prune.*": LOOSE, "prune.d*": LOOSE, "leaf": STRICT, "narrow": {}}
    assert gate_key(gates, name, uses, leaf) == key
