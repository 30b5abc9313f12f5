"""Gates that could never be judged are refused while planning; those that can are written out."""

from pathlib import Path
from typing import Any

import pytest

from compression.errors import EdgepressError
from flows.planning import Plan, load_recipe, make_plan
from flows.planning.gate_checks import gate_lines
from tasks.store.store import Store
from tests.flows.recipes import STAGES, recipe


@pytest.fixture
def plan(tmp_path: Path, checkpoint: Path) -> Any:
    """plan("gates: ..."): the plan of a recipe."""

    def make(gates: str, *overrides: str, stages: str = STAGES) -> Plan:
        file = tmp_path / "micro.yaml"
        file.write_text(recipe(checkpoint, stages, f"gates: {gates}\n"))
        return make_plan(load_recipe(file, overrides), Store(tmp_path / "store"))

    return make


@pytest.mark.parametrize(
    ("gates", "fragment"),
    [
        (
            "{pruned: {perplexty: {max: 9}}}",
            r"gates\.pruned\.perplexty: there is no metric 'perplexty' of pruned; did you mean 'perplexity'",
        ),
        ("{gptq: {tokens_per_second: {min: 1}}}", r"no metric 'tokens_per_second' of gptq"),  # its layout has no fast kernel here
        ("{distilled: {kl_to_parent: {max: 1}}}", "no metric 'kl_to_parent' of distilled"),
        ("{gguf: {kl_to_base: {max_rise: 1}}}", "'kl_to_base' is not measured of base, so that of gguf cannot be relative to it"),
        ("{gptq: {fallback_layers: {max_rise: 0, relative_to: parent}}}", "'fallback_layers' is not measured of distilled"),
        ("{base: {perplexity: {max_increase: 1}}}", r"gates\.base\.perplexity: relative_to 'base' .*nothing precedes the base"),
        ("{leaf: {sparsity: {min: 0}}}", r"gates\.leaf\.sparsity: there is no metric 'sparsity' of gguf"),
        ("{prund: strict}", r"gates\.prund: there is no stage 'prund'; did you mean 'pruned'"),
        ("{'prun.*': loose}", r"gates\.prun\.\*: no kind of stage matches"),
        ("{pruned: {acuracy: {min: 0, if_measured: true}}}", "no metric 'acuracy' of pruned"),
        ("{pruned: strikt}", "there is no preset 'strikt'; did you mean 'strict'"),
    ],
)
def test_unjudgeable_gates_are_refused(plan: Any, gates: str, fragment: str) -> None:
    with pytest.raises(EdgepressError, match=fragment) as caught:
        plan(gates)
    assert "micro.yaml:" in str(caught.value)


def test_the_message_lists_main_metrics(plan: Any) -> None:
    with pytest.raises(EdgepressError) as caught:
        plan("{gptq: {acuracy: {min: 1}}}\nevaluation: {red_team: embedded}")
    listed = str(caught.value).partition("it has ")[2].split(", ")
    assert {"accuracy", "perplexity", "fallback_layers", "refusal_rate", "top1_agreement"} <= set(listed)
    assert not {"accuracy_delta", "accuracy_low", "perplexity_ratio", "accuracy_count", "refusal_rate.fraud"} & set(listed)


def test_method_metrics_and_intervals_can_be_bounded(plan: Any) -> None:
    plan("{gptq: {fallback_layers: {max: 0}, perplexity_ratio_high: {max: 2}}, distilled: {loss_kd: {max: 9}}, onnx: {size_mb: {max: 9}}}")
    plan("{base: {accuracy: {min: 0}}}")


def test_only_presets_allow_accuracy_without_questions(plan: Any) -> None:
    with pytest.raises(EdgepressError, match="no metric 'accuracy' of pruned"):
        plan("{pruned: {accuracy: {min: 0}}}", "data.questions=null")
    plan("{preset: default}", "data.questions=null")


def test_the_default_preset_tightens_at_leaves(plan: Any) -> None:
    made = plan("{preset: default, onnx: {accuracy: {max_drop: 0.1}}}")
    assert gate_lines(made.parsed, made.by_name) == [
        "pruned: perplexity at most 900% above base (if measured)",
        "gguf: perplexity at most 10% above base (if measured); accuracy at most 0.02 below base (if measured)",
        "onnx: accuracy at most 0.1 below base",
    ]


def test_a_stage_named_leaf_is_refused(plan: Any) -> None:
    stages = "  leaf: {uses: prune.width, keep: 0.5}\n"
    assert plan("{'prune.*': loose}", stages=stages)
    with pytest.raises(EdgepressError, match=r"gates\.leaf: 'leaf' means every stage that nothing follows"):
        plan("{leaf: strict}", stages=stages)
