import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from compression.errors import EdgepressError
from flows.options import RECIPES
from flows.recipe import json_schema, load_recipe
from flows.yaml_lines import read_yaml
from tasks.stage import stage_kinds
from tests.flows.recipes import recipe


def load(tmp_path: Path, text: str, *overrides: str) -> Any:
    file = tmp_path / "micro.yaml"
    file.write_text(text)
    return load_recipe(file, overrides)


def test_a_stage_follows_the_one_before_it_unless_it_says_otherwise(tmp_path: Path) -> None:
    parsed = load(tmp_path, recipe("tiny"))
    assert parsed.recipe.name == "micro"
    assert {node.name: node.inputs for node in parsed.nodes} == {
        "pruned": {"parent": "base"},
        "distilled": {"parent": "pruned", "teacher": "base"},
        "gptq": {"parent": "distilled"},
        "gguf": {"parent": "gptq"},
        "onnx": {"parent": "distilled"},
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.text=corpus.txt",
            "micro.yaml:2: data.text: Input should be 'embedded', or this must be a mapping of path, revision, config, splits, column",
        ),
        (
            "data.text={pth: corpus.txt}",
            "micro.yaml:2: data.text.path: this key is missing\n"
            "micro.yaml:2: data.text.pth: there is no such key; did you mean 'path'?; keys: path, revision, config, splits, column",
        ),
        ("model=[1]", "micro.yaml:1: model: this must be a mapping of path, revision, license"),
    ],
)
def test_what_may_be_of_several_kinds_is_told_as_one_mistake(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(EdgepressError) as caught:
        load(tmp_path, recipe("tiny"), override)
    assert str(caught.value).replace(f"{tmp_path}/", "") == message


def test_stages_may_stand_in_any_order(tmp_path: Path) -> None:
    stages = "  late: {uses: quantize.gptq, needs: early}\n  early: {uses: prune.width, keep: 0.5, needs: base}\n"
    assert [node.name for node in load(tmp_path, recipe("tiny", stages)).nodes] == ["early", "late"]


def test_execution_is_told_apart_from_parameters(tmp_path: Path) -> None:
    stages = "  gguf: {uses: export.gguf, retries: 3, timeout: 5, bounds: {kl_to_parent: {max: 0.2}}}\n"
    (node,) = load(tmp_path, recipe("tiny", stages)).nodes
    assert node.stage.model_dump().keys() == stage_kinds()["export.gguf"].model_fields.keys()
    assert (node.execution.retries, node.execution.timeout, node.execution.bounds["kl_to_parent"].max) == (3, 5, 0.2)


def test_an_override_reaches_one_of_two_places_that_share_an_alias(checkpoint: Path, tmp_path: Path) -> None:
    stages = "  a: &a {uses: quantize.rtn, group_size: 32, bounds: &b {perplexity: {max: 9}}}\n  b: {uses: quantize.rtn, needs: base, group_size: 16, bounds: *b}\n  c: *a\n"
    (tmp_path / "r.yaml").write_text(recipe(checkpoint, stages))
    found = load_recipe(tmp_path / "r.yaml", ("stages.a.bits=8", "stages.a.bounds.perplexity.max=99"))
    nodes = {node.name: node for node in found.nodes}
    assert [nodes[name].stage.bits for name in "abc"] == [8, 4, 4]  # type: ignore[attr-defined]
    assert [nodes[name].execution.bounds["perplexity"].max for name in "abc"] == [99, 9, 9]


def test_overrides_go_over_the_recipe(tmp_path: Path) -> None:
    parsed = load(
        tmp_path, recipe("tiny"), "stages.distilled.temperature=4", "seed=7", "stages.pruned.keep=0.25", "gates.pruned.perplexity={max: 9}",
        "stages.late={uses: prune.width, keep: 1, needs: base}", "name=other",
    )  # fmt: skip
    nodes = {node.name: node for node in parsed.nodes}
    assert nodes["distilled"].stage.temperature == 4 and nodes["distilled"].stage.steps == 120
    assert nodes["pruned"].stage.keep == 0.25 and nodes["late"].parent == "base"
    assert parsed.recipe.seed == 7 and parsed.recipe.name == "other"
    assert parsed.recipe.gates["pruned"]["perplexity"].max == 9


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "key.of.the.recipe=value"),
        ("stages.pruned.kep=1", "stages.pruned.kep"),
        ("stages.pruned.keep=much", "stages.pruned.keep"),
        ("device.deep=1", "device is no mapping"),
        ("seed=[1", "--set seed=[1"),
    ],
)
def test_a_wrong_override_is_told(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(EdgepressError) as caught:
        load(tmp_path, recipe("tiny"), override)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("evaluation: {harnes: [arc_easy]}", "evaluation.harnes: there is no such key; did you mean 'harness'?; keys: suite, samples"),
        (
            "registry: {name: a, champ: true}",
            "registry.champ: there is no such key; did you mean 'champion'?; keys: name, stages, champion",
        ),
        ("gates: {pruned: {accuracy: {mn: 1}}}", "gates.pruned.accuracy.mn: there is no such key; did you mean 'min'?; keys: min, max"),
        ("gates: {pruned: {accuracy: 0.5}}", "gates.pruned.accuracy: this must be a mapping of min, max"),
        ("gates: {pruned: {accuracy: {}}}", "gates.pruned.accuracy: a bound needs min"),
        ("gates: {pruned: {accuracy: {max_drop: some%}}}", "gates.pruned.accuracy.max_drop: Input should be a valid number"),
        ("gates: {pruned: {accuracy: {max_decrease: some%}}}", "gates.pruned.accuracy.max_decrease: 'some%' is no share: write 5% or 0.05"),
        ("registry: tiny", "registry: this must be a mapping of name, stages, champion"),
        ("evaluation: {harness: arc_easy}", "evaluation.harness: this must be a list: [one, another]"),
    ],
)
def test_a_mistake_deep_in_a_section_says_what_would_be_right(tmp_path: Path, rest: str, words: str) -> None:
    with pytest.raises(EdgepressError) as caught:
        load(tmp_path, recipe("tiny", rest=f"{rest}\n"))
    assert str(caught.value).startswith(f"{tmp_path / 'micro.yaml'}:11: {words}")


def test_a_revision_goes_with_the_model(tmp_path: Path) -> None:
    parsed = load(tmp_path, recipe("org/name@abc"))
    assert (parsed.recipe.model.path, parsed.recipe.model.revision) == ("org/name", "abc")


names = st.text("abcdefgh", min_size=1, max_size=6)
trees = st.recursive(
    st.integers() | names, lambda below: st.lists(below, min_size=1, max_size=3) | st.dictionaries(names, below, min_size=1, max_size=3)
)


@settings(deadline=None)
@given(st.dictionaries(names, trees, min_size=1, max_size=4))
def test_every_key_is_found_on_its_line(tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]) -> None:
    file = tmp_path_factory.getbasetemp() / "lines.yaml"
    file.write_text(yaml.safe_dump(document, default_flow_style=False))
    located = read_yaml(file)
    lines = file.read_text().splitlines()
    assert located.value == document

    def check(value: Any, path: tuple[str | int, ...]) -> None:
        if isinstance(value, dict):
            for key, below in value.items():
                assert f"{key}:" in lines[located.lines[(*path, key)] - 1]
                check(below, (*path, key))
        elif isinstance(value, list):
            for number, below in enumerate(value):
                check(below, (*path, number))

    check(document, ())


def schema_errors(document: Any) -> list[str]:
    return [error.message for error in Draft202012Validator(json_schema()).iter_errors(document)]


def test_the_schema_takes_the_shipped_recipes() -> None:
    Draft202012Validator.check_schema(json_schema())
    shipped = sorted(RECIPES.glob("*.yaml"))
    assert shipped
    for file in shipped:
        assert schema_errors(yaml.safe_load(file.read_text())) == []
        load_recipe(file)


def test_the_schema_takes_a_recipe_with_everything(tmp_path: Path) -> None:
    rest = "gates: {pruned: {perplexity: {max_increase: 0.5, relative_to: parent}}}\nexecution: {cores: 2}\nname: all\nseed: 1\n"
    assert schema_errors(yaml.safe_load(recipe("tiny", rest=rest))) == []
    assert schema_errors(yaml.safe_load(recipe("{path: org/name, revision: abc}", data="embedded"))) == []


@pytest.mark.parametrize(
    "change",
    [
        {"stages": {"pruned": {"uses": "prune.width", "keep": 0.5, "kep": 1}}},
        {"stages": {"pruned": {"uses": "prune.widht", "keep": 0.5}}},
        {"stages": {"pruned": {"uses": "prune.width", "keep": 2}}},
        {"stages": {"pruned": {"uses": "prune.width", "keep": 0.5, "timeout": "soon"}}},
        {"stages": {}},
        {"stagse": {}},
        {"gates": {"pruned": {"perplexity": {"maximum": 1}}}},
        {"model": 3},
    ],
)
def test_the_schema_refuses_what_is_mistyped(change: dict[str, Any]) -> None:
    document = {"model": "embedded", "data": "embedded", "stages": {"pruned": {"uses": "prune.width", "keep": 0.5}}}
    assert schema_errors(document) == []
    assert schema_errors({**document, **change})


def test_the_schema_describes_every_parameter_of_every_kind() -> None:
    definitions = json_schema()["$defs"]
    for kind in stage_kinds().values():
        properties = definitions[f"{kind.__name__}Entry"]["properties"]
        assert set(kind.model_fields) | {"needs", "retries", "timeout", "bounds", "job_variables"} == set(properties)
        assert all("description" in value for key, value in properties.items() if key != "uses"), kind
    json.dumps(definitions)
