"""Wrong recipes through the real command line: exit code 2, one message with file, line and key, no traceback, no run left behind."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from flows.planning import Plan
from tests.flows.recipes import edgepress, recipe
from tests.tiny import tiny_checkpoint

GOOD = "  pruned: {uses: prune.width, keep: 0.5}\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "EDGEPRESS_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def refused(text: str, line_of: str, fragments: list[str], capfd: pytest.CaptureFixture[str], command: str = "run") -> str:
    """Run the recipe and check how it is refused. `line_of` is the text whose line must be named."""
    Path("micro.yaml").write_text(text)
    code, out, err = edgepress([command, "micro.yaml"], capfd)
    line = next(number for number, content in enumerate(text.splitlines(), 1) if line_of in content)
    assert code == 2, err
    assert f"micro.yaml:{line}:" in err
    for word in fragments:
        assert word in err
    assert "Traceback" not in err and out == ""
    assert not Path("mlflow.db").exists() and not Path("mlruns").exists() and not Path("outputs").exists()
    return err


@pytest.mark.parametrize(
    ("stages", "line_of", "fragments"),
    [
        pytest.param(GOOD.replace("0.5", "0.5, kepp: 1"), "kepp", ["stages.pruned.kepp", "did you mean 'keep'?"], id="unknown-key"),
        pytest.param(GOOD + "  q: {uses: quantize.gtpq}\n", "gtpq", ["stages.q.uses", "did you mean 'quantize.gptq'?"], id="unknown-kind"),
        pytest.param(GOOD + "  q:\n    uses: [quantize.gptq]\n", "uses: [", ["stages.q.uses"], id="kind-of-a-wrong-type"),
        pytest.param(GOOD + "  q: {group_size: 32}\n", "  q:", ["stages.q", "`uses`", "quantize.gptq"], id="no-kind"),
        pytest.param(GOOD + "  q: quantize.gptq\n", "  q:", ["stages.q", "`uses`"], id="stage-that-is-no-mapping"),
        pytest.param("  pruned: {uses: prune.width,\n    keep: half}\n", "half", ["stages.pruned.keep", "number"], id="bad-type"),
        pytest.param("  pruned: {uses: prune.width,\n    keep: 2}\n", "keep: 2", ["stages.pruned.keep", "less than or equal to 1"], id="out-of-range"),
        pytest.param(
            "  a: {uses: prune.width, keep: 1,\n    needs: b}\n  b: {uses: prune.width, keep: 1, needs: a}\n", "needs: b",
            ["stages.a.needs", "a, b", "cycle"], id="cycle",
        ),
        pytest.param("  a: {uses: prune.width, keep: 1, needs: a}\n", "  a:", ["stages.a.needs", "cycle"], id="needs-itself"),
        pytest.param(GOOD + "  d:\n    uses: distill\n    needs: prunde\n", "prunde", ["stages.d.needs", "did you mean 'pruned'?"], id="missing-dependency"),
        pytest.param(GOOD + "  d:\n    uses: distill\n    teacher: bose\n", "bose", ["stages.d.teacher", "did you mean 'base'?"], id="missing-teacher"),
        pytest.param("  base: {uses: prune.width, keep: 1}\n", "  base:", ["'base'"], id="reserved-name"),
        pytest.param("  A/b: {uses: prune.width, keep: 1}\n", "A/b", ["'A/b'", "lower case"], id="name-that-is-no-file-name"),
        pytest.param("  q:\n    uses: quantize.gptq\n    group_size: 48\n", "group_size: 48", ["stages.q.group_size", "does not divide", "32"], id="group-size"),
        pytest.param(
            "  x: {uses: export.onnx}\n  q: {uses: quantize.gptq,\n    needs: x, group_size: 32}\n", "needs: x",
            ["stages.q.needs", "cannot follow an export"], id="quantize-after-export",
        ),
        pytest.param(
            "  q: {uses: quantize.gptq, group_size: 32}\n  again: {group_size: 32,\n    uses: quantize.gptq}\n", "    uses: quantize.gptq",
            ["stages.again.uses", "not gptq", "export.gguf"], id="quantized-twice",
        ),
        pytest.param(GOOD + GOOD, "  pruned", ["'pruned'"], id="stage-named-twice"),
    ],
)  # fmt: skip
def test_wrong_stages(checkpoint: Path, stages: str, line_of: str, fragments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    if stages == GOOD + GOOD:
        text = recipe(checkpoint, stages)
        Path("micro.yaml").write_text(text)
        code, _, err = edgepress(["run", "micro.yaml"], capfd)
        assert (code, "micro.yaml:7: the key 'pruned' stands twice (first on line 6)" in err) == (2, True)
    else:
        refused(recipe(checkpoint, stages), line_of, fragments, capfd)


@pytest.mark.parametrize(
    ("rest", "line_of", "fragments"),
    [
        pytest.param(
            "gates:\n  prund: {perplexity: {max: 1}}\n", "prund", ["gates.prund", "stages: base, pruned"], id="gate-on-unknown-stage"
        ),
        pytest.param(
            "gates:\n  pruned:\n    perplexity: {}\n", "perplexity", ["gates.pruned.perplexity", "needs min, max"], id="empty-gate"
        ),
        pytest.param("stagse: {}\n", "stagse", ["stagse", "did you mean 'stages'?"], id="unknown-top-level-key"),
        pytest.param("seed: soon\n", "seed", ["seed", "integer"], id="seed"),
        pytest.param("device: gpu\n", "device: gpu", ["device"], id="device"),
        pytest.param("name: My Recipe\n", "name:", ["name", "lower case"], id="name"),
        pytest.param("seed: !!python/object:os.system {}\n", "seed", ["not YAML"], id="python-tag"),
        pytest.param("seed: [1\n", "seed", [], id="open-bracket"),
        pytest.param("? [a, b]\n: c\n", "? [a", ["not YAML"], id="key-that-is-a-list"),
    ],
)
def test_wrong_keys(checkpoint: Path, rest: str, line_of: str, fragments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    text = recipe(checkpoint, GOOD, rest)
    if "device" in rest:
        text = text.replace("device: cpu\n", "")
    if "seed: [1" in rest:  # the parser finds the missing bracket where the file ends
        line_of = "seed: [1"
        text = recipe(checkpoint, GOOD).replace("seed: 0\n", "") + "seed: [1\nx: }"
        Path("micro.yaml").write_text(text)
        code, _, err = edgepress(["run", "micro.yaml"], capfd)
        assert code == 2 and "not YAML" in err and "micro.yaml:" in err and "Traceback" not in err
        return
    refused(text, line_of, fragments, capfd)


def classify_images(model: Path) -> None:
    edit(model, model_type="vit")


def name_an_unknown_type(model: Path) -> None:
    edit(model, model_type="sesame", architectures=["SesameForCausalLM"])


def want_remote_code(model: Path) -> None:
    edit(model, model_type="sesame", auto_map={"AutoModelForCausalLM": "modeling.Model"})


def pickle_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def forget_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def edit(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (shutil.rmtree, ["there is no model directory"]),
        (classify_images, ["not a causal language model", "vit"]),
        (name_an_unknown_type, ["'sesame'", "transformers"]),
        (want_remote_code, ["auto_map"]),
        (pickle_weights, ["pickled weights", "safetensors"]),
        (truncate, ["truncated or damaged"]),
        (forget_tokenizer, ["tokenizer.json"]),
    ],
)
def test_wrong_models(
    checkpoint: Path, here: Path, damage: Callable[[Path], None], fragments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(checkpoint, here / "model")
    damage(copy)
    refused(recipe(copy, GOOD), "model:", fragments, capfd)


def test_an_unlisted_architecture_is_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_checkpoint(here / "model", "stablelm")
    refused(recipe(model, GOOD), "uses: prune.width", ["'stablelm'", "llama", "quantize.rtn"], capfd)


def test_a_hub_model_without_a_hub(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read when it was imported
    refused(recipe("nobody/nothing", GOOD), "model:", ["nobody/nothing", "HF_HUB_OFFLINE"], capfd)


@pytest.mark.parametrize(
    ("data", "fragments"),
    [
        ("{text: {path: nowhere.txt}}", ["data", "nowhere.txt"]),
        ("{text: embedded, lenght: 3}", ["data.lenght"]),
        ("{text: embedded, length: 4096}", ["data.length", "128 positions"]),
    ],
)
def test_wrong_data(checkpoint: Path, data: str, fragments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    refused(recipe(checkpoint, GOOD, data=data), "data:", fragments, capfd)


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_other_commands_refuse_alike(checkpoint: Path, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    refused(recipe(checkpoint, GOOD.replace("0.5", "7")), "pruned", ["stages.pruned.keep"], capfd, command)


@pytest.mark.parametrize(("text", "fragment"), [("", "empty"), ("- a\n", "mapping"), ("\tx: 1", "not YAML"), ("\x00", "not YAML")])
def test_files_that_are_no_recipe(text: str, fragment: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("micro.yaml").write_text(text)
    code, _, err = edgepress(["run", "micro.yaml"], capfd)
    assert code == 2 and "micro.yaml" in err and fragment in err and "Traceback" not in err
    code, _, err = edgepress(["run", "absent.yaml"], capfd)
    assert code == 2 and "there is no recipe absent.yaml" in err


@pytest.mark.slow
def test_the_process_itself_exits_with_2(checkpoint: Path, here: Path) -> None:
    Path("micro.yaml").write_text(recipe(checkpoint, GOOD.replace("keep", "kepp")))
    for command in ([sys.executable, "-P", "-m", "flows.cli.main"], [Path(sys.executable).with_name("edgepress")]):
        done = subprocess.run([*command, "run", "micro.yaml"], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "micro.yaml:6: stages.pruned.kepp" in done.stderr and "Traceback" not in done.stderr
    assert not (here / "mlflow.db").exists()


def test_validate_and_plan_of_a_good_recipe(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("micro.yaml").write_text(recipe(checkpoint))
    code, out, _ = edgepress(["validate", "micro.yaml"], capfd)
    assert code == 0 and "valid, 5 stages" in out
    code, out, _ = edgepress(["plan", "micro.yaml", "--set", "seed=3"], capfd)
    assert code == 0 and out.count("to run") == 5 and "quantize.gptq" in out
    assert not Path("mlflow.db").exists()


def test_schema_prints_json(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = edgepress(["schema"], capfd)
    assert code == 0 and json.loads(out)["title"] == "edgepress recipe"


def test_doctor_names_versions_and_missing_packages(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tasks.extras.find_spec", lambda name: None if name == "llama_cpp" else object())
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    code, out, _ = edgepress(["doctor"], capfd)
    assert code == 0
    for fragment in (
        "torch",
        "runtime onnxruntime",
        "cpu",
        "missing llama-cpp-python",
        "edgepress[llamacpp]",
        "export.gguf",
        "not reached",
    ):
        assert fragment in out


def test_sensitivity_names_the_layers_and_spends_the_bits(checkpoint: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("micro.yaml").write_text(recipe(checkpoint, GOOD))
    code, out, err = edgepress(["sensitivity", "micro.yaml", "--bits", "4", "--group-size", "32", "--html", "maps.html"], capfd)
    assert code == 0, err
    out, written, _ = out.partition("maps.html")
    layers = yaml.safe_load(out[out.index("layers:") :])["layers"]
    assert written and all(f"<title>{path}: " in Path("maps.html").read_text() for path in layers)
    assert len(layers) == 14 and sum(entry["bits"] for entry in layers.values()) / 14 < 6
    assert all(f"│ {path} " in out for path in layers)
    for bad, fragment in ((["--bits", "9"], "2, 3, 4 or 8"), (["--group-size", "48"], "does not divide")):
        code, _, err = edgepress(["sensitivity", "micro.yaml", *bad], capfd)
        assert code == 2 and fragment in err


def test_run_passes_recompute_options(checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr("flows.cli.main.execute_plan", lambda plan, store, outputs: plans.append(plan))
    Path("micro.yaml").write_text(recipe(checkpoint, GOOD))
    for options in ([], ["--remeasure"], ["--force", "pruned"]):
        assert edgepress(["run", "micro.yaml", *options], capfd)[0] == 0
    assert [plan.remeasure for plan in plans] == [False, True, False]
    assert [plan.by_name["pruned"].recompute for plan in plans] == [False, False, True]
