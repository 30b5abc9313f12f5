"""ONNX graphs against transformers, the ONNX checker and the checkpoint's own numbers."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.loading import load_model, load_tokenizer
from compression.context import Context
from compression.errors import Incompatible, UnusableModel
from export.onnx import OnnxSettings, check_onnx, export_onnx
from export.onnx.save import save_graph
from export.onnx.trace import OPSET
from export.runtimes.onnx_runtime import OnnxRuntime
from tests.export.judging import contents
from tests.tiny import tiny_checkpoint, tiny_windows


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx")
    figures = export_onnx(checkpoint, out, OnnxSettings(dtype="float32"), context=Context())
    assert figures["opset"] == OPSET and figures["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    return out


@pytest.mark.slow
def test_same_bytes_from_another_place(checkpoint: Path, artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And nothing is printed."""
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    export_onnx(tmp_path / "elsewhere", tmp_path / "out", OnnxSettings(dtype="float32"), context=Context())
    assert capfd.readouterr() == ("", "")
    assert contents(tmp_path / "out") == contents(artifact)


def test_holds_no_paths_and_no_trace(artifact: Path) -> None:
    content = (artifact / "model.onnx").read_bytes()
    for trace in (b"/tmp", b"/work", b"/home", b"site-packages", b".py", b"stack_trace", b"pkg.torch"):
        assert trace not in content
    model = onnx.load(artifact / "model.onnx")
    assert not model.metadata_props and not model.doc_string
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_interface(artifact: Path) -> None:
    model = onnx.load(artifact / "model.onnx")
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.output)}
    cached = [f"{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    assert axes == {
        "input_ids": ["batch", "sequence"],
        "position_ids": ["batch", "sequence"],
        "logits": ["batch", "sequence", 320],
        **{f"past_key_values.{name}": ["batch", 2, "past", 16] for name in cached},
        **{f"present.{name}": ["batch", 2, "total", 16] for name in cached},
    }


def test_attention_is_fused_and_products_are_named(checkpoint: Path, artifact: Path) -> None:
    nodes = onnx.load(artifact / "model.onnx").graph.node
    found = Counter(node.op_type for node in nodes)
    assert found["Attention"] == 2 and not found["Where"]
    assert all(len(node.input) == 6 and len(node.output) == 3 for node in nodes if node.op_type == "Attention")
    products = {f"{node.name}.weight" for node in nodes if node.op_type == "MatMul"}
    assert products == {*open_checkpoint(checkpoint).linear_tensors(), "lm_head.weight"}


def test_weights_are_in_the_file_once(checkpoint: Path, artifact: Path) -> None:
    parameters = sum(p.numel() for p in load_model(checkpoint).parameters())  # tied embeddings count once
    model = onnx.load(artifact / "model.onnx")
    assert sum(numpy_helper.to_array(t).size for t in model.graph.initializer) == pytest.approx(parameters, rel=0.01)


def test_carries_tokenizer_and_config(checkpoint: Path, artifact: Path) -> None:
    assert json.loads((artifact / "config.json").read_text()) == open_checkpoint(checkpoint).config
    text = "Dalo owns the lamp — 日本語"
    assert load_tokenizer(artifact)(text).input_ids == load_tokenizer(checkpoint)(text).input_ids


def test_large_weights_get_their_own_file(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.onnx.save.EXTERNAL_DATA_BYTES", 1000)
    shutil.copy(artifact / "config.json", tmp_path)
    save_graph(onnx_ir.load(artifact / "model.onnx"), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size > 300_000 > (tmp_path / "model.onnx").stat().st_size
    ids = tiny_windows(1, 8).numpy()
    np.testing.assert_array_equal(OnnxRuntime(tmp_path, threads=1).logits(ids), OnnxRuntime(artifact, threads=1).logits(ids))


WINDOW = 8  # shorter than the texts here


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tied", "dtype", "settings"),
    [
        ("mistral", True, "float32", {"sliding_window": WINDOW}),
        ("qwen2", False, "float16", {}),
        ("qwen3", True, "float32", {}),
        ("olmo2", False, "float32", {}),
        ("smollm3", True, "float32", {"layers": 2}),  # one with, one without rotary embedding
        ("gemma3_text", True, "float32", {"layers": 2}),  # one with a window, one without
        ("phi3", True, "float32", {"sliding_window": WINDOW}),
    ],
)
def test_every_family_equals_transformers(family: str, tied: bool, dtype: str, settings: dict, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", family, tied=tied, **{"layers": 1} | settings)
    export_onnx(source, tmp_path / "out", OnnxSettings(dtype=dtype), context=Context())
    tolerance = 0.05 if dtype == "float16" else 1e-4
    ids = tiny_windows(2, 3 * WINDOW)
    expected = load_model(source)(ids, use_cache=False).logits.detach().numpy()
    runtime = OnnxRuntime(tmp_path / "out", threads=1)
    np.testing.assert_allclose(runtime.logits(ids.numpy()), expected, atol=tolerance)
    runtime.start(ids[0, :WINDOW].tolist(), 2 * WINDOW)
    decoded = [runtime.step(int(token)).copy() for token in ids[0, WINDOW:]]
    np.testing.assert_allclose(np.stack(decoded), expected[0, WINDOW:], atol=tolerance)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"dtype": "int4"}, "target"),
        ({"dtype": "int4", "target": "onnxruntime", "block_size": 256}, "block_size"),  # wider than the rows
        ({"dtype": "float16", "embedding_type": "int8", "head_type": "int8"}, "embedding_type"),
        ({"dtype": "int8", "head_type": "int8", "embedding_type": "float32"}, "head_type"),  # one tensor
    ],
)
def test_refuses_bad_options(checkpoint: Path, options: dict, key: str) -> None:
    with pytest.raises(Incompatible) as error:
        check_onnx(open_checkpoint(checkpoint), OnnxSettings(**options))
    assert error.value.key == key


def test_refuses_before_work(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}})
    )
    with pytest.raises(Incompatible, match="'dynamic'"):
        export_onnx(source, tmp_path / "out", OnnxSettings(), context=Context())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(Incompatible, match="'gpt2'"):
        export_onnx(source, tmp_path / "out", OnnxSettings(), context=Context())
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(Incompatible, match="needs them"):
        export_onnx(source, tmp_path / "out", OnnxSettings(dtype="int8-static"), context=Context())
    (source / "tokenizer.json").unlink()
    with pytest.raises(UnusableModel, match="no tokenizer.json"):
        export_onnx(source, tmp_path / "out", OnnxSettings(), context=Context())
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UnusableModel, match="truncated"):
        export_onnx(source, tmp_path / "out", OnnxSettings(), context=Context())
    assert not (tmp_path / "out").exists()


def test_a_write_error_leaves_nothing(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(graph: onnx_ir.Model, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.onnx.writer.trace_generation", lambda model: onnx_ir.load(artifact / "model.onnx"))
    monkeypatch.setattr("export.onnx.writer.save_graph", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(tiny_checkpoint(tmp_path / "model"), tmp_path / "out", OnnxSettings(), context=Context())
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
