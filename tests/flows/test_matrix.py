"""Sweeps: from `matrix:` to cells, copies of stages, identities, runs in MLflow and the comparison."""

import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from compression.errors import EdgepressError
from flows.cli.screen import plan_table
from flows.planning import ParsedRecipe, Plan, estimate, json_schema, load_recipe, make_plan
from flows.planning.matrix import Cell, Matrix, expand_matrix, key_of
from flows.planning.source_map import SourceMap
from tasks.store.store import Store
from tests.flows.recipes import recipe

STAGES = """\
  pruned: {uses: prune.width, keep: 0.5}
  distilled: {uses: distill, steps: 6, batch_size: 2}
  gptq: {uses: quantize.gptq, group_size: 32}
  gguf: {uses: export.gguf, type: carry}
  onnx: {uses: export.onnx, needs: pruned}
"""


@pytest.fixture
def load(tmp_path: Path, checkpoint: Path) -> Callable[..., ParsedRecipe]:
    """load(matrix, ...): a recipe with this matrix."""

    def made(matrix: str, *overrides: str, stages: str = STAGES, rest: str = "") -> ParsedRecipe:
        file = tmp_path / "sweep.yaml"
        file.write_text(recipe(checkpoint, stages, f"matrix: {matrix}\n{rest}"))
        return load_recipe(file, overrides)

    return made


@pytest.fixture
def plan(load: Callable[..., ParsedRecipe], tmp_path: Path) -> Callable[..., Plan]:
    return lambda *arguments, **more: make_plan(load(*arguments, **more), Store(tmp_path / "store"))


def names(parsed: ParsedRecipe) -> list[str]:
    return [node.name for node in parsed.nodes]


def chosen(parsed: ParsedRecipe) -> list[dict[str, Any]]:
    return [dict(branch.values) for branch in parsed.branches]


# --- cells ---


def cells(matrix: dict[str, Any], *stages: str) -> list[Cell]:
    return expand_matrix(Matrix.model_validate(matrix), stages or ("a", "b"), SourceMap(Path("r.yaml"), {}, {}))


def values(matrix: dict[str, Any], *stages: str) -> list[dict[str, Any]]:
    return [{key_of(path): value.value for path, value in cell.values.items()} for cell in cells(matrix, *stages)]


def test_the_last_list_varies_fastest() -> None:
    assert values({"a.x": [1, 2], "b.y": [3, 4]}) == [{"a.x": x, "b.y": y} for x, y in product([1, 2], [3, 4])]


def test_lists_go_side_by_side() -> None:
    sides = [{"a.x": 1, "b.y": 3}, {"a.x": 2, "b.y": 4}]
    assert values({"a.x": [1, 2], "b.y": [3, 4], "zip": True}) == sides
    grouped = values({"a.x": [1, 2], "a.z": [5, 6], "b.y": [3, 4], "zip": [["b.y", "stages.a.x"]]})
    assert sorted(grouped, key=str) == sorted([{**side, "a.z": z} for side in sides for z in (5, 6)], key=str)


def test_exclude_and_include_do_as_in_github_actions() -> None:
    """The example of GitHub's documentation of `jobs.<job_id>.strategy.matrix.include`."""
    matrix = {
        "a.fruit": ["apple", "pear"], "a.animal": ["cat", "dog"],
        "include": [
            {"b.color": "green"}, {"b.color": "pink", "a.animal": "cat"}, {"a.fruit": "apple", "b.shape": "circle"},
            {"a.fruit": "banana"}, {"a.fruit": "banana", "a.animal": "cat"},
        ],
    }  # fmt: skip
    assert values(matrix) == [
        {"a.fruit": "apple", "a.animal": "cat", "b.color": "pink", "b.shape": "circle"},
        {"a.fruit": "apple", "a.animal": "dog", "b.color": "green", "b.shape": "circle"},
        {"a.fruit": "pear", "a.animal": "cat", "b.color": "pink"},
        {"a.fruit": "pear", "a.animal": "dog", "b.color": "green"},
        {"a.fruit": "banana"},
        {"a.fruit": "banana", "a.animal": "cat"},
    ]
    left = values({"a.x": [1, 2], "b.y": [3, 4, 5], "exclude": [{"a.x": 1, "b.y": 4}, {"b.y": 5}]})
    assert left == [{"a.x": 1, "b.y": 3}, {"a.x": 2, "b.y": 3}, {"a.x": 2, "b.y": 4}]


def test_a_stage_may_have_dots_in_its_name() -> None:
    (cell,) = cells({"v1.0.keep": [1]}, "v1", "v1.0")
    assert list(cell.values) == [("stages", "v1.0", "keep")]


anything = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=60)
    | st.lists(st.text(max_size=9), max_size=3)
)


@given(st.lists(anything, min_size=1, max_size=6, unique_by=json.dumps))
def test_names_are_safe_and_distinct(tried: list[Any]) -> None:
    try:
        made = cells({"a.x": tried, "b.x": [1]})
    except EdgepressError as error:
        assert "looks like" in str(error)  # 2 and "2"
        return
    found = [cell.name for cell in made]
    assert len(set(found)) == len(tried)
    for name in found:
        assert len(name) <= 200 and not set(name) & set("/\\{}[]:* \n\0") and name.isascii()


# --- copies of stages ---


def test_a_stage_has_one_copy_each_choice(load: Any) -> None:
    parsed = load("{distilled.temperature: [1.0, 2.0], gptq.bits: [2, 3, 4]}")
    assert sorted(names(parsed)) == sorted(
        ["pruned", "onnx"]
        + [f"distilled@temperature={t}" for t in (1.0, 2.0)]
        + [f"{stage}@temperature={t},bits={b}" for stage in ("gptq", "gguf") for t in (1.0, 2.0) for b in (2, 3, 4)]
    )
    nodes = {node.name: node for node in parsed.nodes}
    assert nodes["gguf@temperature=2.0,bits=3"].parent == "gptq@temperature=2.0,bits=3"
    assert nodes["gptq@temperature=2.0,bits=3"].parent == "distilled@temperature=2.0"
    assert nodes["distilled@temperature=2.0"].inputs == {"parent": "pruned", "teacher": "base"}
    assert nodes["gptq@temperature=2.0,bits=3"].stage.bits == 3
    assert len(parsed.branches) == 6 and {branch.leaves for branch in parsed.branches} == {("gguf",)}
    done = {"base"}
    for node in parsed.nodes:
        assert done.issuperset(node.inputs.values()), "the order is topological"
        done.add(node.name)


def test_a_value_reaches_readers_in_any_role(load: Any) -> None:
    stages = "  pruned: {uses: prune.width, keep: 0.5}\n  other: {uses: prune.width, keep: 0.25, needs: base}\n"
    stages += "  taught: {uses: distill, steps: 2, needs: other, teacher: pruned}\n"
    parsed = load("{pruned.keep: [0.5, 0.75]}", stages=stages)
    assert sorted(names(parsed)) == ["other", "pruned@keep=0.5", "pruned@keep=0.75", "taught@keep=0.5", "taught@keep=0.75"]
    taught = next(node for node in parsed.nodes if node.name == "taught@keep=0.75")
    assert taught.inputs == {"parent": "other", "teacher": "pruned@keep=0.75"}


def test_ambiguous_keys_keep_their_stage(load: Any) -> None:
    stages = "  a: {uses: quantize.rtn, needs: base}\n  b: {uses: quantize.gptq, needs: base}\n"
    assert names(load("{a.bits: [2], b.bits: [4]}", stages=stages)) == ["a@a.bits=2", "b@b.bits=4"]


def test_the_graph_itself_can_be_swept(load: Any) -> None:
    stages = STAGES.partition("  gptq")[0] + "  codes: {uses: quantize.rtn, group_size: 32}\n"
    parsed = load("{codes.uses: [quantize.rtn, quantize.gptq], codes.needs: [pruned, distilled]}", stages=stages)
    found = {node.name: (node.stage.uses, node.parent) for node in parsed.nodes if node.origin == "codes"}
    assert found == {
        f"codes@uses={uses},needs={needs}": (uses, needs) for uses in ("quantize.rtn", "quantize.gptq") for needs in ("pruned", "distilled")
    }


def test_the_matrix_may_give_required_parameters(load: Any) -> None:
    parsed = load("{pruned.keep: [0.5, 0.75]}", stages="  pruned: {uses: prune.width}\n")
    assert [node.stage.keep for node in parsed.nodes] == [0.5, 0.75]


def test_an_included_cell_keeps_other_values(load: Any) -> None:
    parsed = load("{include: [{gptq.bits: 3}, {distilled.temperature: 4.0}]}")
    assert chosen(parsed) == [{"gptq.bits": 3}, {"distilled.temperature": 4.0}]
    nodes = {node.name: node for node in parsed.nodes}
    assert nodes["gptq@bits=3"].parent == "distilled" and nodes["gptq@temperature=4.0"].parent == "distilled@temperature=4.0"
    assert nodes["gptq@temperature=4.0"].stage.bits == 4


def test_overrides_reach_the_matrix(load: Any) -> None:
    parsed = load("{gptq.bits: [2, 3]}", "matrix.gptq.bits=[8]", "matrix.seed=[1,2]")
    assert chosen(parsed) == [{"gptq.bits": 8, "seed": 1}, {"gptq.bits": 8, "seed": 2}] or chosen(parsed) == [
        {"seed": 1, "gptq.bits": 8}, {"seed": 2, "gptq.bits": 8},
    ]  # fmt: skip


# --- plans ---


def test_copies_have_the_identities_of_plain_stages(plan: Any) -> None:
    swept = plan("{distilled.temperature: [1.0, 2.0], gptq.act_order: [true, false]}")
    for temperature, order in product([1.0, 2.0], ["true", "false"]):
        hand = plan("null", f"stages.distilled.temperature={temperature}", f"stages.gptq.act_order={order}")
        twins = {
            "pruned": "pruned", "distilled": f"distilled@temperature={temperature}",
            "gptq": f"gptq@temperature={temperature},act_order={order}", "gguf": f"gguf@temperature={temperature},act_order={order}", "onnx": "onnx",
        }  # fmt: skip
        assert {name: task.identity for name, task in hand.by_name.items() if name != "base"} == {
            name: swept.by_name[twin].identity for name, twin in twins.items()
        }


def test_a_seed_copies_every_stage(plan: Any) -> None:
    swept = plan("{seed: [0, 7]}")
    for seed in (0, 7):
        hand = plan("null", f"seed={seed}")
        for name, task in hand.by_name.items():
            assert swept.by_name[name if name == "base" else f"{name}@seed={seed}"].identity == task.identity
    assert len(swept.stages) == 11


def test_gates_and_bounds_follow_copies(plan: Any) -> None:
    stages = STAGES.replace("type: carry", "type: carry, bounds: {perplexity: {max_increase: 1, relative_to: distilled}}")
    gates = "gates: {gguf: {accuracy: {max_decrease: 0.1, relative_to: gptq}}, onnx: {accuracy: {min: 0.1, relative_to: pruned}}}\n"
    made = plan("{distilled.temperature: [1.0, 2.0], gptq.act_order: [true]}", stages=stages, rest=gates)
    for t in (1.0, 2.0):
        task = made.by_name[f"gguf@temperature={t},act_order=true"]
        assert task.gates["accuracy"].relative_to == f"gptq@temperature={t},act_order=true"
        assert task.bounds["perplexity"].relative_to == f"distilled@temperature={t}"
    assert made.by_name["onnx"].gates["accuracy"].relative_to == "pruned"


def test_unshared_stages_belong_to_their_cell(plan: Any) -> None:
    made = plan("{distilled.temperature: [1.0, 2.0], gptq.act_order: [true, false]}")
    assert {name for name, task in made.by_name.items() if not task.cell} == {
        "base", "pruned", "onnx", "distilled@temperature=1.0", "distilled@temperature=2.0",
    }  # fmt: skip
    gguf = made.by_name["gguf@temperature=1.0,act_order=false"]
    assert gguf.cell == "temperature=1.0,act_order=false"


def test_planning_time_grows_with_the_cells(plan: Any, tmp_path: Path) -> None:
    gates = "gates: {gptq: {perplexity: {max_increase: 9, relative_to: distilled}}}\n"
    stages = STAGES.replace("  gguf: {uses: export.gguf, type: carry}\n", "")

    def seconds(cells: int) -> float:
        steps = ", ".join(str(n + 1) for n in range(cells // 4))
        started = time.process_time()
        made = plan(f"{{distilled.steps: [{steps}], gptq.bits: [2, 3, 4, 8]}}", rest=gates, stages=stages)
        assert len(made.parsed.branches) == cells
        plan_table(made, Store(tmp_path / "store"))
        return time.process_time() - started

    seconds(4)
    small, large = seconds(40), seconds(200)
    assert large < 12 * small + 0.5, f"{small:.2f} s for 40 cells, {large:.2f} s for 200"


def test_estimates_include_the_teachers_of_copies(plan: Any) -> None:
    made = plan("{pruned.keep: [0.25, 0.75]}")
    small, large = (estimate(made.by_name[f"distilled@keep={keep}"], made) for keep in (0.25, 0.75))
    assert small.memory < large.memory


# --- mistakes ---

MATRIX = "matrix:\n"
MISTAKES = [
    ("  distilld.temperature: [1]\n", 1, "matrix.distilld.temperature: .*did you mean 'distilled'"),
    ("  distilled: [1]\n", 1, "matrix.distilled: .*<stage>.<parameter>"),
    ("  distilled.temprature: [1]\n", 1, r"matrix.distilled.temprature.0: there is no such key; did you mean 'temperature'"),
    ("  distilled.temperature: []\n", 1, "matrix.distilled.temperature: .*at least 1"),
    ("  distilled.temperature: 2\n", 1, "matrix.distilled.temperature: .*list"),
    ("  distilled.temperature:\n    - 1\n    - much\n", 3, "matrix.distilled.temperature.1: .*number"),
    ("  distilled.temperature: [1, 1]\n", 1, r"matrix.distilled.temperature.1: the cells temperature=1 and temperature=1 are the same"),
    ("  distilled.temperature: [1, 1.0]\n", 1, r"matrix.distilled.temperature.1: the cells temperature=1.0 and temperature=1 are the same"),
    ("  gptq.bits: [4]\n  stages.gptq.bits: [3]\n", 2, "matrix.stages.gptq.bits: gptq.bits stands twice"),
    ("  gptq.retries: [1, 2]\n", 1, "matrix.gptq.retries: .*nothing to compare"),
    ("  gptq.group_size.deep: [1]\n", 1, "gptq.group_size is not a mapping"),
    ("  gptq.bits.deep: [1]\n", 1, "matrix.gptq.bits.deep.0: Input should be 2, 3, 4 or 8"),
    ("  gptq.needs: [distiled]\n", 1, r"matrix.gptq.needs.0: there is no stage 'distiled'; did you mean 'distilled'"),
    ("  gptq.uses: [quantize.gtpq]\n", 1, r"matrix.gptq.uses.0: there is no stage kind 'quantize.gtpq'; did you mean 'quantize.gptq'"),
    ("  seed: [-1]\n", 1, "matrix.seed.0: .*greater than or equal to 0"),
    ("  gptq.bits: [2, 3]\n  exclude:\n    - {gptq.bits: 5}\n", 3, "matrix.exclude.0: no cell has gptq.bits 5"),
    ("  gptq.bits: [2, 3]\n  exclude: [{gptq.group_size: 5}]\n", 2, r"matrix.exclude.0.gptq.group_size: gptq.group_size has no list"),
    ("  gptq.bits: [2]\n  exclude: [{gptq.bits: 2}]\n", 0, "matrix: `exclude` leaves no cell"),
    ("  zip: true\n", 0, "matrix: it has neither lists of values nor `include`"),
    ("  gptq.bits: [2, 3]\n  gptq.group_size: [32]\n  zip: true\n", 3, "matrix.zip: .*gptq.bits 2, gptq.group_size 1"),
    ("  gptq.bits: [2, 3]\n  zip: [[gptq.bits, gptq.group_size]]\n", 2, "matrix.zip.0.1: gptq.group_size has no list"),
    ("  gptq.bits: [2, 3]\n  gptq.group_size: [1, 2]\n  zip: [[gptq.bits, gptq.group_size], [gptq.bits, seed]]\n  seed: [1, 2]\n", 3, "stands 2 times"),
    ("  include: [{gptq.bitz: 4}]\n", 1, r"matrix.include.0.gptq.bitz: there is no such key; did you mean 'bits'"),
    ("  include: [{gptq.bits: 4}, {gptq.bits: 3}, {gptq.group_size: 32}]\n", 1, "the cells group_size=32 and bits=4 are the same"),
]  # fmt: skip


@pytest.mark.parametrize(("matrix", "line", "fragment"), MISTAKES)
def test_mistakes_name_their_line(tmp_path: Path, matrix: str, line: int, fragment: str) -> None:
    file = tmp_path / "sweep.yaml"
    text = recipe("tiny", STAGES, MATRIX + matrix)
    file.write_text(text)
    first = text.splitlines().index("matrix:") + 1
    with pytest.raises(EdgepressError, match=rf"sweep\.yaml:{first + line}: .*{fragment}"):
        load_recipe(file)


def test_a_product_that_is_too_large_is_refused(load: Any) -> None:
    numbers = list(range(1, 101))
    with pytest.raises(EdgepressError, match="1,000,000 cells; the most is 10,000"):
        load(f"{{distilled.steps: {numbers}, gptq.bits: {numbers}, pruned.keep: {numbers}}}")


def test_an_unfit_value_is_located_in_the_matrix(plan: Any) -> None:
    with pytest.raises(EdgepressError, match=r"sweep\.yaml:11: matrix\.gptq\.group_size\.1: .*\(stage gptq@group_size=48\)"):
        plan("{gptq.group_size: [32, 48]}")
    with pytest.raises(EdgepressError, match=r"sweep\.yaml:8: stages\.gptq\.group_size: .*\(stage gptq@keep=0\.75\)"):
        plan("{pruned.keep: [0.5, 0.75]}", stages=STAGES.replace("group_size: 32", "group_size: 64"))


def test_the_schema_checks_the_matrix() -> None:
    def errors(matrix: str) -> list[str]:
        document = {"model": "embedded", "data": "embedded", "stages": {"q": {"uses": "quantize.rtn"}}, "matrix": yaml.safe_load(matrix)}
        return [error.message for error in Draft202012Validator(json_schema()).iter_errors(document)]

    assert errors("{q.bits: [2, 3], seed: [0], zip: [[q.bits, seed]], exclude: [{q.bits: 2}], include: [{q.bits: 8, q.sym: true}]}") == []
    for wrong in ("{q.bits: 2}", "{q.bits: []}", "{zip: 3}", "{exclude: {q.bits: 2}}", "{seed: [-1]}"):
        assert errors(wrong), wrong


def test_key_order_of_included_cells_is_irrelevant(load: Callable[..., ParsedRecipe]) -> None:
    parsed = load(
        "{pruned.keep: [0.5], distilled.steps: [6], gptq.bits: [4], include: [{gptq.bits: 8, distilled.steps: 6, pruned.keep: 0.5}]}"
    )
    assert len(parsed.branches) == 2 and sum(node.origin == "distilled" for node in parsed.nodes) == 1


@pytest.mark.parametrize("order", ["[pruned, distilled]", "[distilled, pruned]"])
def test_a_leaf_has_no_follower_anywhere(load: Callable[..., ParsedRecipe], order: str) -> None:
    stages = "".join(line + "\n" for line in STAGES.splitlines()[:3])
    parsed = load(f"{{gptq.needs: {order}}}", stages=stages, rest="gates: {leaf: {perplexity: {max: 11}}}\n")
    assert {node.name for node in parsed.nodes if node.gates} == {"gptq@needs=pruned", "gptq@needs=distilled"}
