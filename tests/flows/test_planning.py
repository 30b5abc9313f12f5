import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compression.errors import EdgepressError
from flows.planning import Plan, check_disk, estimate, load_recipe, make_plan
from tasks.stage import Artifact
from tasks.store.store import Store
from tests.flows.recipes import STAGES, recipe


@pytest.fixture
def plan(tmp_path: Path, checkpoint: Path) -> Any:
    """plan(stages=, rest=) or plan("key=value", ...): the plan of a recipe."""

    def make(*overrides: str, stages: str = STAGES, rest: str = "", name: str = "micro") -> Plan:
        file = tmp_path / f"{name}.yaml"
        file.write_text(recipe(checkpoint, stages, rest))
        return make_plan(load_recipe(file, overrides), Store(tmp_path / "store"))

    return make


def identities(plan: Plan) -> dict[str, str]:
    return {task.name: task.identity for task in plan.stages}


def changed(plan: Plan, other: Plan) -> set[str]:
    before, after = identities(plan), identities(other)
    return {name for name in before if before[name] != after[name]}


def test_the_plan_follows_configs_through_the_graph(plan: Any) -> None:
    tasks = {task.name: task for task in plan().stages}
    assert list(tasks) == ["base", "pruned", "distilled", "gptq", "gguf", "onnx"]
    assert [task.index for task in tasks.values()] == list(range(6))
    assert tasks["pruned"].product.intermediate_size == tasks["distilled"].product.intermediate_size == 64
    assert tasks["gptq"].product.layout == "gptq"
    assert tasks["gguf"].product.runtime == "llama.cpp" and tasks["gguf"].product.change == "carried"
    assert tasks["gguf"].ancestors == ("base", "pruned", "distilled", "gptq")


def test_exports_have_default_bounds(plan: Any) -> None:
    bounds = {task.name: task.bounds for task in plan("stages.onnx.bounds={kl_to_parent: {max: 0.5}}").stages}
    assert bounds["gguf"]["kl_to_parent"].max == 1e-3 and bounds["onnx"]["kl_to_parent"].max == 0.5
    assert bounds["pruned"] == {}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.gptq.act_order=false", {"gptq", "gguf"}),
        ("stages.distilled.temperature=4", {"distilled", "gptq", "gguf", "onnx"}),
        ("stages.onnx.dtype=int8", {"onnx"}),
        ("seed=1", {"pruned", "distilled", "gptq", "gguf", "onnx"}),
        ("threads=2", {"pruned", "distilled", "gptq", "gguf", "onnx"}),
        ("data.calibration_windows=5", {"gptq", "gguf"}),
        ("data.train_documents=41", {"distilled", "gptq", "gguf", "onnx"}),
        ("data.evaluation_windows=5", set()),
        ("stages.gptq.retries=3", set()),
        ("stages.gptq.timeout=100", set()),
        ("stages.gguf.bounds={kl_to_parent: {max: 9}}", set()),
        ("gates.pruned.perplexity={max: 9}", set()),
        ("execution.cores=1", set()),
        ("model={path: CHECKPOINT, license: mit}", {"gguf", "onnx"}),  # which artifacts state
        ("name=other", set()),
    ],
)
def test_an_override_changes_identities(plan: Any, checkpoint: Path, override: str, expected: set[str]) -> None:
    override = override.replace("CHECKPOINT", str(checkpoint))
    if "calibration_windows" in override or "train_documents" in override:
        assert expected <= changed(plan(), plan(override))  # how finely data is told apart is compression.data's matter
    else:
        assert changed(plan(), plan(override)) == expected


def test_names_are_outside_the_identity(plan: Any) -> None:
    renamed = "  thin: {uses: prune.width, keep: 0.5}\n  taught: {uses: distill, steps: 6, batch_size: 2, save_every: 2, teacher: thin}\n"
    stages = (
        "  pruned: {uses: prune.width, keep: 0.5}\n  distilled: {uses: distill, steps: 6, batch_size: 2, save_every: 2, teacher: pruned}\n"
    )
    assert list(identities(plan(stages=stages)).values()) == list(identities(plan(stages=renamed, name="another")).values())


def test_a_changed_model_changes_every_identity(plan: Any, checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert changed(plan(), plan(f"model={copy}")) == set()
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert changed(plan(), plan(f"model={copy}")) == set(identities(plan()))


def test_bounds_refer_only_to_ancestors(plan: Any) -> None:
    plan("gates.gguf.perplexity={max_increase: 1, relative_to: gptq}")
    for reference in ("onnx", "gguf", "nothing"):
        with pytest.raises(EdgepressError, match="gates.gguf.perplexity"):
            plan(f"gates.gguf.perplexity={{max_increase: 1, relative_to: {reference}}}")
        with pytest.raises(EdgepressError, match="stages.gguf.bounds.perplexity"):
            plan(f"stages.gguf.bounds={{perplexity: {{max_increase: 1, relative_to: {reference}}}}}")


def test_a_missing_extra_is_refused(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.extras.find_spec", lambda name: None if name == "llama_cpp" else object())
    with pytest.raises(EdgepressError, match=r"stages\.gguf.*llama-cpp-python.*edgepress\[llamacpp\]"):
        plan()


def test_an_unusable_gpu_is_refused(plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr("tasks.runners.machine._DEV", tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert plan("device=auto").machine.device == "cpu"
    with pytest.raises(EdgepressError, match=r"device: cuda cannot be used here: CUDA_VISIBLE_DEVICES='-1' leaves no GPU"):
        plan("device=cuda")
    (tmp_path / "cuda.yaml").write_text((tmp_path / "micro.yaml").read_text().replace("device: cpu", "device: cuda"))
    cuda = load_recipe(tmp_path / "cuda.yaml")
    with pytest.raises(EdgepressError, match=r"cuda\.yaml:3: device: cuda cannot be used here"):
        make_plan(cuda, Store(tmp_path / "store"))
    assert make_plan(cuda, Store(tmp_path / "store"), elsewhere=True).machine.device == "cuda"


def test_estimates_are_close_to_file_sizes(plan: Any, checkpoint: Path) -> None:
    made = plan()
    first = made.stages[0]
    real = (checkpoint / "model.safetensors").stat().st_size
    assert 0.9 * real < estimate(first, made).size <= 1.1 * real
    for task in made.stages[1:]:
        assert estimate(task, made).size > 0 and estimate(task, made).memory > 0
        assert isinstance(task.product, Artifact) or task.product.num_parameters > 0


def test_a_disk_that_is_too_small_is_refused(plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    made = plan()
    check_disk(made, store)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(EdgepressError, match="free some, or use another --store"):
        check_disk(made, store)


def test_the_plan_digests_measurement_settings(plan: Any, tmp_path: Path) -> None:
    lines = ["\n".join(json.dumps({"text": f"{word} {n} and some words"}) for n in range(40)) for word in ("one", "another", "third")]
    texts, questions = tmp_path / "texts", tmp_path / "q.jsonl"
    texts.mkdir()
    (texts / "train.jsonl").write_text(lines[0])
    (texts / "test.jsonl").write_text(lines[1])
    questions.write_text('{"question": "Where?", "answers": ["there"]}\n{"question": "Who?", "answers": ["she"]}\n')
    given = (f"data.text={{path: {texts}}}", f"evaluation.question_answering={questions}")

    def differ(*overrides: str) -> set[str]:
        after = plan(*given, *overrides).measured_with
        assert after.keys() == before.keys()
        return {name for name in before if before[name] != after[name]}

    before = plan(*given).measured_with
    assert before.keys() == {"quality", "samples", "question_answering"}
    assert not differ("data.train_documents=7", "data.calibration_windows=2", "stages.gptq.bits=8", "evaluation.num_fewshot=3")
    assert differ("evaluation.limit=1") == {"question_answering"}
    (texts / "train.jsonl").write_text(lines[2])
    assert not differ()
    (texts / "test.jsonl").write_text(lines[2])
    assert differ() == {"quality", "samples"}
    questions.write_text('{"question": "Where?", "answers": ["here"]}\n{"question": "Who?", "answers": ["she"]}\n')
    assert differ() == before.keys()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"model={'x' * 400}", "model"),
        (f"model=/{'x' * 400}", "model"),
        ("model=~nobody-of-that-name/x", "model"),
        (f"data.text={{path: {'x' * 400}}}", "data"),
        (f"data.text={{path: {'x' * 400}.txt}}", "data"),
        (f"evaluation={{question_answering: {'x' * 400}.jsonl}}", "evaluation"),
        (f"stages.distilled.teacher=/{'x' * 400}", "stages.distilled.teacher"),
    ],
)
def test_unreadable_paths_are_named_with_their_key(plan: Any, override: str, key: str) -> None:
    with pytest.raises(EdgepressError, match=rf"micro\.yaml:\d+: {key}"):
        plan(override)


def test_a_teacher_path_may_contain_at(plan: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "teacher@home").symlink_to(checkpoint)
    made = plan(f"stages.distilled.teacher={tmp_path}/teacher@home")
    assert made.by_name["distilled"].outside["teacher"].checkpoint.path.is_dir()


@pytest.fixture
def village(tmp_path: Path) -> str:
    """A data section of local text: 60 short documents to train on, 12 to measure with."""
    for split, count in (("train", 60), ("test", 12)):
        (tmp_path / f"{split}.txt").write_text("\n\n".join(f"The lamp is in the mill. {number}" for number in range(count)))
    return f"{{text: {{path: {tmp_path}}}, length: 32, calibration_windows: 4, evaluation_windows: 4}}"


@pytest.mark.parametrize(
    ("override", "stage", "key"),
    [
        ("data.calibration_windows=64", "{uses: quantize.gptq, group_size: 32}", "data.calibration_windows"),
        ("data.length=128", "{uses: finetune}", "data.length"),
        ("data.train_documents=1", "{uses: finetune}", "data.length"),
        ("stages.one.prompt_tokens=30", "{uses: synthesize, documents: 2, length: 64, prompt_tokens: 4}", "stages.one.prompt_tokens"),
    ],
)
def test_text_that_fills_too_little_is_refused(checkpoint: Path, tmp_path: Path, village: str, override: str, stage: str, key: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(recipe(checkpoint, f"  one: {stage}\n", data=village))
    make_plan(load_recipe(file, []), Store(tmp_path / "store"))
    if override == "data.length=128":
        (tmp_path / "test.txt").write_text("The lamp.")
    with pytest.raises(EdgepressError, match=rf"{key}"):
        make_plan(load_recipe(file, [override]), Store(tmp_path / "store"))


def test_a_template_refusing_questions_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('System first!') }}{% endif %}{{ messages[-1].content }}"
    (model / "chat_template.jinja").write_text(wants)
    file = tmp_path / "r.yaml"
    file.write_text(recipe(model, "  one: {uses: quantize.rtn, group_size: 32}\n"))
    with pytest.raises(EdgepressError, match=r"data\.questions.*System first!.*data\.questions\.system"):
        make_plan(load_recipe(file, []), Store(tmp_path / "store"))
    make_plan(load_recipe(file, ["data.questions={path: embedded, system: Be brief.}"]), Store(tmp_path / "store"))


def test_synthesize_needs_a_start_token(checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None, "eos_token": None}))
    file = tmp_path / "r.yaml"
    file.write_text(recipe(model, "  one: {uses: synthesize, documents: 2, length: 64}\n"))
    with pytest.raises(EdgepressError, match="neither BOS nor EOS"):
        make_plan(load_recipe(file, []), Store(tmp_path / "store"))
