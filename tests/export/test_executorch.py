"""ExecuTorch programs against transformers."""

import json
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.loading import load_model, load_tokenizer
from compression.context import Context
from compression.data import DataSpec
from compression.errors import EdgepressError, Incompatible, UnusableModel
from compression.evaluation.generation import generate
from export.checks import TRACED_FAMILIES
from export.contents import read_contents
from export.executorch import ExecutorchSettings, check_executorch
from export.runtimes import open_runtime
from tasks.stage import Artifact, stage_kinds
from tests.export.judging import contents, greedy, kl, model_of
from tests.tiny import tiny_windows

if find_spec("executorch") is None:
    pytest.skip("ExecuTorch is not installed: pip install 'edgepress[executorch]'", allow_module_level=True)

from export.executorch import export_executorch


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("executorch")
    figures = export_executorch(checkpoint, out, ExecutorchSettings(), context=Context())
    assert figures["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    return out


@pytest.mark.parametrize("family", TRACED_FAMILIES)
def test_every_family_equals_transformers_in_prefill_and_decode(family: str, tmp_path: Path) -> None:
    """In several calls of 16 tokens, far beyond a sliding window of 8 (gemma3_text, mistral), and with a head of its own (qwen2)."""
    source = model_of(tmp_path / "model", family)
    export_executorch(source, tmp_path / "out", ExecutorchSettings(max_length=64, chunk=16), context=Context())
    runtime = open_runtime(tmp_path / "out", threads=1)
    assert (runtime.name, runtime.version, runtime.max_length) == ("executorch", metadata.version("executorch"), 64)
    ids = tiny_windows(2, 40)
    expected = load_model(source)(ids).logits.detach().numpy()
    found = runtime.logits(ids.numpy())
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert kl(expected, found) < 1e-6
    decoded = np.array([runtime.start(ids[1, :20].tolist(), 20), *(runtime.step(int(token)) for token in ids[1, 20:])])
    assert kl(expected[1, 19:], decoded) < 1e-6


def test_generates_what_transformers_does_up_to_the_last_token_and_repeats_itself(checkpoint: Path, tmp_path: Path) -> None:
    export_executorch(checkpoint, tmp_path, ExecutorchSettings(max_length=33, chunk=128), context=Context())
    runtime = open_runtime(tmp_path, threads=2)
    tokens = greedy(checkpoint, 9, 24)
    for _ in range(2):  # a second time: the cache of the first is forgotten
        assert generate(runtime, tokens[0, :9].tolist(), 24).tokens == tokens[0, 9:].tolist()
    np.testing.assert_allclose(
        runtime.logits(tokens.numpy()), load_model(checkpoint)(tokens).logits.detach().numpy(), atol=1e-4
    )  # all 33 of the cache
    np.testing.assert_array_equal(runtime.logits(tokens.numpy()), runtime.logits(tokens.numpy()))
    with pytest.raises(Incompatible, match="9 \\+ 25 tokens"):
        generate(runtime, tokens[0, :9].tolist(), 25)
    runtime.close()
    with pytest.raises(AttributeError):
        runtime.logits(tokens.numpy())


def test_xnnpack_computes_the_linear_layers(checkpoint: Path, artifact: Path) -> None:
    """Nearly all multiplications: what is left to the slow portable operators has no matrix of weights."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    plan = next(p for p in deserialize_pte_binary((artifact / "model.pte").read_bytes()).program.execution_plan if p.name == "forward")
    assert {delegate.id for delegate in plan.delegates} == {"XnnpackBackend"}
    assert not {"aten::linear", "aten::mm", "aten::addmm"} & {operator.name for operator in plan.operators}


def test_weights_are_in_the_file_once_and_a_tied_embedding_twice(checkpoint: Path, artifact: Path) -> None:
    model = load_model(checkpoint)
    stored = sum(p.numel() for p in model.parameters()) + model.get_input_embeddings().weight.numel()
    size = (artifact / "model.pte").stat().st_size
    assert 4 * stored < size < 4 * stored + 100_000  # the rest is the program


def test_same_bytes_from_another_place_and_nothing_said(
    checkpoint: Path, artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    export_executorch(tmp_path / "elsewhere", tmp_path / "out", ExecutorchSettings(), context=Context())
    assert capfd.readouterr() == ("", "")
    assert contents(tmp_path / "out") == contents(artifact)


def test_says_nothing_of_where_it_was_made(artifact: Path) -> None:
    content = (artifact / "model.pte").read_bytes()
    assert not [trace for trace in (b"/tmp", b"/work", b"/home", b"/root", b"site-packages", b".py") if trace in content]


def test_carries_tokenizer_and_config(checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    assert json.loads((artifact / "config.json").read_text()) == open_checkpoint(checkpoint).config
    text = "Dalo owns the lamp — 日本語"
    assert load_tokenizer(artifact)(text).input_ids == load_tokenizer(checkpoint)(text).input_ids


def test_inspect_tells_its_bytes(checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    found = read_contents(artifact)
    assert found.runtime == "executorch" and found.architecture == read_contents(checkpoint).architecture
    weights = 4 * sum(p.numel() for p in load_model(checkpoint).parameters())
    assert weights < found.settings["weight bytes"] < (artifact / "model.pte").stat().st_size - found.settings["program bytes"] + 1
    for damage in (lambda data: data[:-1000], lambda data: data[:20], lambda data: b"\0" * 64 + data[64:]):
        (tmp_path / "model.pte").write_bytes(damage((artifact / "model.pte").read_bytes()))
        with pytest.raises(UnusableModel, match="truncated or damaged") as error:
            read_contents(tmp_path)
        assert error.value.key == "model"
        with pytest.raises(UnusableModel, match="damaged, or no program"):
            open_runtime(tmp_path, threads=1)


@pytest.mark.parametrize(
    ("changes", "parameters", "key", "words"),
    [
        ({}, {"max_length": 129}, "max_length", "16 to the 128 tokens"),
        ({"max_position_embeddings": 8}, {}, "max_length", "16 to the 8 tokens"),
        ({"model_type": "gpt_neox"}, {}, "uses", "'gpt_neox'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, "uses", "'dynamic'"),
    ],
)
def test_refuses_before_work(changes: dict, parameters: dict, key: str, words: str, checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(checkpoint, source)
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | changes))
    with pytest.raises(Incompatible, match=words) as error:
        check_executorch(open_checkpoint(source), ExecutorchSettings(**parameters))
    assert error.value.key == key
    with pytest.raises(Incompatible, match=words):
        export_executorch(source, tmp_path / "out", ExecutorchSettings(**parameters), context=Context())
    assert not (tmp_path / "out").exists()


def test_a_truncated_checkpoint_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(EdgepressError):
        export_executorch(tmp_path / "model", tmp_path / "out", ExecutorchSettings(), context=Context())
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_write_error_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(program: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.executorch.writer.trace_generation", lambda *_: None)
    monkeypatch.setattr("export.executorch.writer.lower", lambda *_: None)
    monkeypatch.setattr("export.executorch.writer.write_program", full)
    with pytest.raises(OSError, match="No space left"):
        export_executorch(checkpoint, tmp_path / "out", ExecutorchSettings(), context=Context())
    assert not list(tmp_path.iterdir())


def test_the_stage_plans_what_it_writes(checkpoint: Path, artifact: Path) -> None:
    data = DataSpec.model_validate({"text": "embedded", "questions": "embedded"})
    stage = stage_kinds()["export.executorch"].model_validate({"uses": "export.executorch"})
    planned = stage.plan(open_checkpoint(checkpoint), {}, data.model_copy(update={"length": 128}))
    assert isinstance(planned, Artifact) and (planned.runtime, planned.change) == ("executorch", "float")
    assert (artifact / "model.pte").stat().st_size == pytest.approx(planned.size_bytes, rel=0.2)
    with pytest.raises(Incompatible, match="windows of 129 tokens") as error:
        stage.plan(open_checkpoint(checkpoint), {}, data.model_copy(update={"length": 129}))
    assert error.value.key == "max_length"
