"""ONNX graphs against transformers, the ONNX checker and a float64 formula."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper

import export.onnx
from compression.checkpoint import open_checkpoint
from compression.context import Context
from compression.errors import Incompatible
from compression.loading import load_model, load_tokenizer
from export.checks import check_onnx
from export.onnx import OPSET, export_onnx, quantize_linears, save_graph
from export.runtimes.onnx_runtime import OnnxRuntime
from tests.tiny import tiny_checkpoint, tiny_windows


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx")
    figures = export_onnx(checkpoint, out, dtype="float32", context=Context())
    assert figures["opset"] == OPSET and figures["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    return out


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture
def int8_graph(artifact: Path) -> onnx_ir.Model:
    return quantize_linears(onnx_ir.load(artifact / "model.onnx"))


def test_same_bytes_from_another_place_and_nothing_said(
    checkpoint: Path, artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    export_onnx(tmp_path / "elsewhere", tmp_path / "out", dtype="float32", context=Context())
    assert capfd.readouterr() == ("", "")
    assert contents(tmp_path / "out") == contents(artifact)


def test_says_nothing_of_where_and_how_it_was_made(artifact: Path) -> None:
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


def test_weights_are_in_the_file_once(checkpoint: Path, artifact: Path) -> None:
    parameters = sum(p.numel() for p in load_model(checkpoint).parameters())  # tied embeddings count once
    model = onnx.load(artifact / "model.onnx")
    assert sum(numpy_helper.to_array(t).size for t in model.graph.initializer) == pytest.approx(parameters, rel=0.01)


def test_carries_tokenizer_and_config(checkpoint: Path, artifact: Path) -> None:
    assert json.loads((artifact / "config.json").read_text()) == open_checkpoint(checkpoint).config
    text = "Dalo owns the lamp — 日本語"
    assert load_tokenizer(artifact)(text).input_ids == load_tokenizer(checkpoint)(text).input_ids


def test_int8_quantizes_the_linear_layers_of_the_blocks_only(checkpoint: Path, int8_graph: onnx_ir.Model, tmp_path: Path) -> None:
    save_graph(int8_graph, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert str(tmp_path.parent).encode() not in (tmp_path / "model.onnx").read_bytes() and not model.metadata_props
    assert Counter(node.op_type for node in model.graph.node)["MatMulInteger"] == 7 * 2
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    weights = [p.detach().double().numpy().T for name, p in load_model(checkpoint).named_parameters() if "proj" in name]
    codes = [array for array in constants.values() if array.dtype == np.int8 and array.ndim == 2]
    assert len(codes) == len(weights) == 14
    for weight in weights:  # found by its rounded values: every code within half a step of the weight, by float64 formula
        scale = np.abs(weight).max(axis=0) / 127.5
        assert any(c.shape == weight.shape and (np.abs(c - weight / scale) <= 1.01).all() for c in codes)


def test_large_weights_go_beside_the_graph(
    artifact: Path, int8_graph: onnx_ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_graph(int8_graph, tmp_path / "int8.onnx")
    monkeypatch.setattr(export.onnx, "EXTERNAL_DATA_BYTES", 1000)
    graph = onnx_ir.load(artifact / "model.onnx")
    shutil.copy(artifact / "config.json", tmp_path)
    save_graph(graph, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size > 300_000 > (tmp_path / "model.onnx").stat().st_size
    ids = tiny_windows(1, 8).numpy()
    np.testing.assert_array_equal(OnnxRuntime(tmp_path, threads=1).logits(ids), OnnxRuntime(artifact, threads=1).logits(ids))
    save_graph(quantize_linears(onnx_ir.load(artifact / "model.onnx")), tmp_path / "int8_external.onnx")
    inside, beside = (onnx.load(tmp_path / name) for name in ("int8.onnx", "int8_external.onnx"))
    assert {t.name: t.raw_data for t in inside.graph.initializer}.keys() == {t.name for t in beside.graph.initializer}


@pytest.mark.parametrize(
    ("family", "tied", "dtype", "tolerance"),
    [("mistral", True, "float32", 1e-4), ("qwen2", False, "float16", 0.05), ("qwen3", True, "float32", 1e-4)],
)
def test_every_family_equals_transformers(family: str, tied: bool, dtype: export.onnx.Dtype, tolerance: float, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", family, layers=1, tied=tied)
    export_onnx(source, tmp_path / "out", dtype=dtype, context=Context())
    ids = tiny_windows(2, 12)
    expected = load_model(source)(ids).logits.detach().numpy()
    found = OnnxRuntime(tmp_path / "out", threads=1).logits(ids.numpy())
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_refuses_before_work(tmp_path: Path) -> None:
    window = open_checkpoint(tiny_checkpoint(tmp_path / "window", "mistral", layers=1, sliding_window=16))
    with pytest.raises(Incompatible, match="16 tokens of 128") as error:
        check_onnx(window, dtype="float32")
    assert error.value.key == "uses"
    other = open_checkpoint(tiny_checkpoint(tmp_path / "other", "olmo2", layers=1))
    with pytest.raises(Incompatible, match="'olmo2'"):
        export_onnx(other.path, tmp_path / "out", dtype="float32", context=Context())
    assert not (tmp_path / "out").exists()
    with pytest.raises(Incompatible, match="float32, float16, int8") as error:
        check_onnx(open_checkpoint(tiny_checkpoint(tmp_path / "model", layers=1)), dtype="int4")
    assert error.value.key == "dtype"
