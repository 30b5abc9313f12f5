import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from compression.errors import EdgepressError
from flows.planning import json_schema, load_recipe
from flows.planning.recipe import RECIPES, split_revision
from flows.planning.source_map import read_yaml
from tasks.stage import stage_kinds
from tests.flows.recipes import recipe


def load(tmp_path: Path, text: str, *overrides: str) -> Any:
    file = tmp_path / "micro.yaml"
    file.write_text(text)
    return load_recipe(file, overrides)


def test_a_stage_follows_its_predecessor_by_default(tmp_path: Path) -> None:
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
def test_alternative_types_give_one_error(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(EdgepressError) as caught:
        load(tmp_path, recipe("tiny"), override)
    assert str(caught.value).replace(f"{tmp_path}/", "") == message


def test_stages_may_stand_in_any_order(tmp_path: Path) -> None:
    stages = "  late: {uses: quantize.gptq, needs: early}\n  early: {uses: prune.width, keep: 0.5, needs: base}\n"
    assert [node.name for node in load(tmp_path, recipe("tiny", stages)).nodes] == ["early", "late"]


def test_execution_is_separate_from_parameters(tmp_path: Path) -> None:
    stages = "  gguf: {uses: export.gguf, retries: 3, timeout: 5, bounds: {kl_to_parent: {max: 0.2}}}\n"
    (node,) = load(tmp_path, recipe("tiny", stages)).nodes
    assert node.stage.model_dump().keys() == stage_kinds()["export.gguf"].model_fields.keys()
    assert (node.execution.retries, node.execution.timeout, node.execution.bounds["kl_to_parent"].max) == (3, 5, 0.2)


def test_an_override_leaves_other_aliases_unchanged(checkpoint: Path, tmp_path: Path) -> None:
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
    ("override", "fragment"),
    [
        ("seed", "key.of.the.recipe=value"),
        ("stages.pruned.kep=1", "stages.pruned.kep"),
        ("stages.pruned.keep=much", "stages.pruned.keep"),
        ("device.deep=1", "device is not a mapping"),
        ("seed=[1", "--set seed=[1"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path: Path, override: str, fragment: str) -> None:
    with pytest.raises(EdgepressError) as caught:
        load(tmp_path, recipe("tiny"), override)
    assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("rest", "fragment"),
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
        (
            "gates: {pruned: {accuracy: {max_decrease: some%}}}",
            "gates.pruned.accuracy.max_decrease: 'some%' is not a share: write 5% or 0.05",
        ),
        ("registry: tiny", "registry: this must be a mapping of name, stages, champion"),
        ("evaluation: {harness: arc_easy}", "evaluation.harness: this must be a list: [one, another]"),
    ],
)
def test_nested_errors_name_the_remedy(tmp_path: Path, rest: str, fragment: str) -> None:
    with pytest.raises(EdgepressError) as caught:
        load(tmp_path, recipe("tiny", rest=f"{rest}\n"))
    assert str(caught.value).startswith(f"{tmp_path / 'micro.yaml'}:11: {fragment}")


def test_a_revision_follows_the_model_name(tmp_path: Path) -> None:
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
def test_the_schema_refuses_wrong_types(change: dict[str, Any]) -> None:
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


STAGE = "  pruned: {uses: prune.width, keep: 0.5}\n"


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("seed: 2026-13-45\n", "micro.yaml:7: not YAML: '2026-13-45' is not a valid timestamp"),
        ("seed: !!int x\n", "micro.yaml:7: not YAML: 'x' is not a valid int"),
        ("seed: !!bool x\n", "micro.yaml:7: not YAML: 'x' is not a valid bool"),
        ("seed: !!timestamp x\n", "micro.yaml:7: not YAML: 'x' is not a valid timestamp"),
        (f"seed: {'9' * 5000}\n", "micro.yaml:7: not YAML: '99"),
        (f"seed: {'[' * 5000}\n", "micro.yaml:1: not YAML: brackets are nested too deep"),
        ("execution: &a [*a]\n", "micro.yaml:7: execution.0: this contains itself"),
        ("execution: &a {x: {y: *a}}\n", "micro.yaml:7: execution.x.y: this contains itself"),
        ("a: &a {b: 1, c: 2}\nd: 3\ne: 4\nf: 5\ng: 6\n", "micro.yaml:7: a: there are no such keys: a, d, e and 2 more; keys: name, model"),
    ],
)
def test_yaml_traps_are_refused_in_one_line(tmp_path: Path, rest: str, message: str) -> None:
    with pytest.raises(EdgepressError) as caught:
        load(tmp_path, recipe("tiny", STAGE, rest))
    assert str(caught.value).startswith(f"{tmp_path}/{message}") and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else '*a'] * 10)}]\n" for n in range(12))
    with pytest.raises(EdgepressError, match="aliases make more than 100,000 values"):
        load(tmp_path, recipe("tiny", STAGE, bomb))


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("stages:\n  on: {uses: prune.width, keep: 1}\n", "micro.yaml:2: stages.on: the key on is a truth value in YAML"),
        ("stages:\n  1: {uses: prune.width, keep: 1}\n", "micro.yaml:2: stages.1: the key 1 is a number in YAML"),
        ("stages:\n  2026-01-01: {uses: prune.width, keep: 1}\n", "micro.yaml:2: stages.2026-01-01: the key 2026-01-01 is a date in YAML"),
        ("stages:\n  a: {uses: prune.width, keep: 1, needs: no}\n", "micro.yaml:2: stages.a.needs: Input should be a valid string; in YAML this is a truth value"),
        ("name: 1\n", "micro.yaml:1: name: Input should be a valid string; in YAML this is a number"),
        ("name: 2026-01-01\n", "micro.yaml:1: name: Input should be a valid string; in YAML this is a date"),
        ("evaluation: {energy: off}\n", "micro.yaml:1: evaluation.energy: Input should be 'counters', 'estimate' or 'off'; in YAML this is a truth value"),
    ],
)  # fmt: skip
def test_unquoted_non_texts_are_explained(tmp_path: Path, rest: str, message: str) -> None:
    text = "".join(
        line
        for line in (recipe("tiny", STAGE).splitlines(keepends=True))
        if "stages" not in rest or ("tages" not in line and "pruned" not in line)
    )
    with pytest.raises(EdgepressError) as caught:
        load(tmp_path, rest + text)
    assert f"{tmp_path}/{message}" in str(caught.value) and "quotes" in str(caught.value)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999", "'nan'"])
@pytest.mark.parametrize(
    ("rest", "place"),
    [
        ("  d: {uses: distill, learning_rate: VALUE}\n", "stages.d.learning_rate"),
        ("  d: {uses: prune.width, keep: 1, timeout: VALUE}\n", "stages.d.timeout"),
        ("  x: {uses: export.gguf, bounds: {kl_to_parent: {max: VALUE}}}\n", "stages.x.bounds.kl_to_parent.max"),
        ("gates: {pruned: {perplexity: {max_rise: VALUE}}}\n", "gates.pruned.perplexity.max_rise"),
        ("execution: {memory_gib: VALUE}\n", "execution.memory_gib"),
        ("matrix: {pruned.keep: [VALUE, 0.5]}\n", "matrix.pruned.keep.0"),
        ("study: {question: a, paper: b, finding: c, metrics: [d], x: {keys: [e], label: f}, published: {at: [1, 2], values: {p: [VALUE, 1]}}}\n", "study.published.values.p.0"),
    ],
)  # fmt: skip
def test_every_number_of_a_recipe_is_finite(tmp_path: Path, rest: str, place: str, value: str) -> None:
    with pytest.raises(EdgepressError, match=rf"{place}: .*finite"):
        load(tmp_path, recipe("tiny", STAGE, rest.replace("VALUE", value)))


def test_an_override_is_finite_too(tmp_path: Path) -> None:
    with pytest.raises(EdgepressError, match="keep: .*finite"):
        load(tmp_path, recipe("tiny", STAGE), "stages.pruned.keep=.nan")


def test_every_kind_of_stage_takes_finite_numbers_only() -> None:
    assert all(kind.model_config["allow_inf_nan"] is False for kind in stage_kinds().values())


@pytest.mark.parametrize("text", [f"name: {'x' * 400}\n" + recipe("tiny"), recipe("tiny", STAGE.replace("pruned", "x" * 400))])
def test_names_that_no_file_can_have_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(EdgepressError, match=r"400 characters\).* longer than 80"):
        load(tmp_path, text)


@pytest.mark.parametrize("name", ["run.json", "report.html"])
def test_names_of_a_runs_own_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(EdgepressError, match="a run writes"):
        load(tmp_path, recipe("tiny", STAGE.replace("pruned", name)))


def test_an_at_sign_in_paths_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "a@b").mkdir(parents=True)
    (tmp_path / "plain").mkdir()
    assert split_revision("models/a@b") == ("models/a@b", None)
    assert split_revision(f"{tmp_path}/models/a@b") == (f"{tmp_path}/models/a@b", None)
    assert split_revision("./gone@b") == ("./gone@b", None)
    assert split_revision("org/name@refs/pr/1") == ("org/name", "refs/pr/1")
    assert split_revision("plain@main") == ("plain", "main")  # which the model's check refuses
    assert split_revision("embedded") == ("embedded", None)
