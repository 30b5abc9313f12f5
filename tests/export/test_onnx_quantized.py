"""Integer layers of ONNX graphs: against a float64 formula, ONNX Runtime's own quantizer, and the codes of checkpoints."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.compressed_tensors import read_scaled_linears
from compression.checkpoints.layouts import read_quantized_linears
from compression.checkpoints.loading import load_model, save_model
from compression.checkpoints.schemes import read_scheme
from compression.context import Context
from compression.errors import Incompatible, UnusableModel
from compression.evaluation.scorers import divergence
from compression.quantization.awq import quantize_awq
from compression.quantization.gptq import quantize_gptq
from compression.quantization.settings import AWQSettings, GPTQSettings, SmoothQuantSettings
from compression.quantization.smoothquant import quantize_smoothquant
from export.onnx import OnnxSettings, check_onnx, export_onnx, writer
from export.onnx.calibrate import Histogram, input_limits
from export.onnx.quantize import layers_of
from export.onnx.trace import trace_generation
from export.runtimes.onnx_runtime import OnnxRuntime
from tests.tiny import tiny_checkpoint, tiny_windows

WINDOWS = tiny_windows(4, 24)


@pytest.fixture(scope="module")
def source(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with norms that differ, as the exporter stores equal weights once."""
    model, out = load_model(checkpoint), tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    save_model(model, out, like=checkpoint)
    return out


@pytest.fixture(scope="module")
def traced(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of that checkpoint, on disk: tracing takes longer than everything else here."""
    export_onnx(source, out := tmp_path_factory.mktemp("traced"), OnnxSettings(), context=Context())
    return out


@pytest.fixture
def once(traced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of checkpoints of the same shapes take that graph, with the weights of the model that is to be traced."""

    def retrace(model: torch.nn.Module) -> onnx_ir.Model:
        graph = onnx_ir.load(traced / "model.onnx")
        for name, weight in model.state_dict().items():
            value = graph.graph.initializers.get(name)
            if value is not None:
                array = weight.numpy().T if "_proj" in name else weight.numpy()
                value.const_value = onnx_ir.tensor(np.ascontiguousarray(array), name=name)
        return graph

    monkeypatch.setattr(writer, "trace_generation", retrace)


def constants(directory: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(directory / "model.onnx").graph.initializer}


def operators(directory: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(directory / "model.onnx").graph.node)


def kl(directory: Path, checkpoint: Path) -> float:
    """Mean KL divergence of an artifact from its checkpoint in transformers."""
    ids = tiny_windows(4, 24, seed=9)
    with torch.no_grad():
        expected = load_model(checkpoint)(ids).logits.numpy()
    return float(divergence(expected, OnnxRuntime(directory, threads=1).logits(ids.numpy())).kl.mean())


@pytest.mark.usefixtures("once")
def test_dynamic_int8_is_onnx_runtimes_own(source: Path, traced: Path, tmp_path: Path) -> None:
    export_onnx(source, tmp_path / "ours", OnnxSettings(dtype="int8"), context=Context())
    assert operators(tmp_path / "ours")["MatMulInteger"] == 7 * 2 and operators(tmp_path / "ours")["MatMul"] == 1
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text((traced / "config.json").read_text())
    quantize_dynamic(
        traced / "model.onnx", tmp_path / "theirs" / "model.onnx", op_types_to_quantize=["MatMul"], nodes_to_exclude=["lm_head"],
        per_channel=True, weight_type=QuantType.QInt8,
    )  # fmt: skip
    ids = tiny_windows(2, 12).numpy()
    ours, theirs = (OnnxRuntime(tmp_path / name, threads=1).logits(ids) for name in ("ours", "theirs"))
    np.testing.assert_allclose(ours, theirs, atol=0.05)
    found = constants(tmp_path / "ours")
    for name, parameter in load_model(source).named_parameters():
        if "_proj" in name:
            weight = parameter.detach().double().numpy()
            scale = np.abs(weight).max(axis=1) / 127
            np.testing.assert_allclose(found[f"{name}_scale"], scale, rtol=1e-6)
            np.testing.assert_array_equal(found[f"{name}_codes"].T, np.round(weight / found[f"{name}_scale"].astype(np.float64)[:, None]))


@pytest.mark.usefixtures("once")
def test_static_int8_is_qdq_of_standard_operators(source: Path, tmp_path: Path) -> None:
    export_onnx(source, tmp_path, OnnxSettings(dtype="int8-static"), windows=WINDOWS, context=Context())
    model = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""} == {o.domain for o in model.opset_import}
    found = operators(tmp_path)
    assert found["QuantizeLinear"] == 4 * 2  # q, k and v share an input, and so do gate and up
    assert found["DequantizeLinear"] == (4 + 7) * 2 and found["MatMul"] == 7 * 2 + 1
    assert all(not array.any() for name, array in constants(tmp_path).items() if "zero" in name)  # symmetric
    export_onnx(source, tmp_path / "dynamic", OnnxSettings(dtype="int8"), context=Context())
    assert kl(tmp_path, source) < 2 * kl(tmp_path / "dynamic", source) < 0.1


@pytest.mark.usefixtures("once")
def test_static_int8_multiplies_integers_in_onnx_runtime(source: Path, tmp_path: Path) -> None:
    for target in ("portable", "onnxruntime"):
        export_onnx(source, tmp_path / target, OnnxSettings(target=target, dtype="int8-static"), windows=WINDOWS, context=Context())
    ids = tiny_windows(2, 24).numpy()
    portable, own = (OnnxRuntime(tmp_path / target, threads=1).logits(ids) for target in ("portable", "onnxruntime"))
    np.testing.assert_allclose(own, portable, atol=0.05)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(tmp_path / "onnxruntime" / "model.onnx"), options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert found["MatMulIntegerToFloat"] == 7 * 2 and not found["DequantizeLinear"]


def test_ranges_are_those_of_the_inputs_in_transformers(source: Path, traced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what runs behind a filled cache: every window is cut into pieces."""
    graph = onnx_ir.load(traced / "model.onnx")
    paths = [name.removesuffix(".weight") for name in open_checkpoint(source).linear_tensors()]
    monkeypatch.setattr(Histogram, "limit", lambda self: self.largest)
    found = input_limits(graph, layers_of(graph, paths), WINDOWS, Context())
    model, expected = load_model(source), {}
    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(lambda _, x, path=path: expected.__setitem__(path, float(x[0].abs().max())))
    model(WINDOWS)
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(graph.graph.outputs) == 5  # as before


def test_the_limit_has_the_least_squared_error() -> None:
    values = np.random.default_rng(0).standard_t(3, 100_000).astype(np.float32)  # heavy tails: cutting them off pays
    histogram = Histogram()
    histogram.add(values[:50_000])
    histogram.add(values[50_000:])

    def error(limit: float) -> float:
        x, scale = values.astype(np.float64), limit / 127
        return float(np.square(np.clip(np.round(x / scale), -127, 127) * scale - x).mean())

    best = min(error(limit) for limit in np.linspace(0.02, 1, 100) * np.abs(values).max())
    assert histogram.limit() < 0.9 * histogram.largest == pytest.approx(0.9 * np.abs(values).max())
    assert error(histogram.limit()) < 1.02 * best


def test_refuses_inputs_that_stay_zero(source: Path, traced: Path) -> None:
    graph = onnx_ir.load(traced / "model.onnx")
    graph.graph.initializers["model.layers.0.input_layernorm.weight"].const_value = onnx_ir.tensor(np.zeros(64, np.float32))
    with pytest.raises(UnusableModel, match="layers.0.self_attn.q_proj are 0 or not finite"):
        input_limits(graph, layers_of(graph, ["model.layers.0.self_attn.q_proj"]), WINDOWS, Context())


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("dtype", ["int8", "int8-static"])
def test_carries_the_codes_of_w8a8(source: Path, dtype: str, tmp_path: Path) -> None:
    quantize_smoothquant(source, quantized := tmp_path / "w8a8", SmoothQuantSettings(), WINDOWS, context=Context())
    export_onnx(
        quantized,
        out := tmp_path / "out",
        OnnxSettings(dtype=dtype),
        windows=WINDOWS if dtype == "int8-static" else None,
        context=Context(),
    )
    found, opened = constants(out), open_checkpoint(quantized)
    layers = dict(read_scaled_linears(opened, read_scheme(opened)))
    assert len(layers) == 14
    for path, layer in layers.items():
        dequantized = found[f"{path}.weight_codes"].T.astype(np.float32) * found[f"{path}.weight_scale"][:, None]
        np.testing.assert_array_equal(dequantized, layer.dequantize().numpy())
    assert kl(out, quantized) < 0.05
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_carries_4_bit_codes(source: Path, layout: str, tmp_path: Path) -> None:
    quantize, settings = {"gptq": (quantize_gptq, GPTQSettings), "awq": (quantize_awq, AWQSettings)}[layout]
    quantize(source, quantized := tmp_path / layout, settings(group_size=32), tiny_windows(), context=Context())
    export_onnx(quantized, out := tmp_path / "out", OnnxSettings(target="onnxruntime", dtype="int4", accuracy_level=1), context=Context())
    assert operators(out)["MatMulNBits"] == 14
    found = constants(out)
    for path, layer in read_quantized_linears(quantized):
        packed = found[f"{path}.weight_codes"]
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(layer.codes.shape)
        np.testing.assert_array_equal(codes, layer.codes.numpy())
        np.testing.assert_array_equal(found[f"{path}.weight_scale"], layer.scales.float().numpy())
    ids = tiny_windows(2, 24)
    expected = load_model(quantized)(ids).logits.detach().numpy()
    np.testing.assert_allclose(OnnxRuntime(out, threads=1).logits(ids.numpy()), expected, atol=1e-3)


@pytest.mark.usefixtures("once")
def test_rounds_a_dense_checkpoint_to_int4(source: Path, tmp_path: Path) -> None:
    export_onnx(source, tmp_path, OnnxSettings(target="onnxruntime", dtype="int4", block_size=16), context=Context())
    found = constants(tmp_path)
    weight = load_model(source).get_submodule("model.layers.0.mlp.up_proj").weight.detach().numpy()
    packed, scale = (found[f"model.layers.0.mlp.up_proj.weight_{part}"] for part in ("codes", "scale"))
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(128, 4, 16).astype(np.float32)
    error = np.abs(((codes - 8) * scale[..., None]).reshape(128, 64) - weight).reshape(128, 4, 16)
    assert (error.max(-1) <= 1.6 * scale).all() and np.median(error / scale[..., None]) < 0.3  # ranges may be cut where that pays


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("dtype", ["float32", "int8", "int8-static"])
def test_embedding_and_tied_head_share_codes(source: Path, dtype: str, tmp_path: Path) -> None:
    windows = WINDOWS if dtype == "int8-static" else None
    export_onnx(source, tmp_path, OnnxSettings(dtype=dtype, embedding_type="int8"), windows=windows, context=Context())
    tables = [array for array in constants(tmp_path).values() if array.size == 320 * 64]
    assert [table.dtype for table in tables] == [np.int8]
    assert kl(tmp_path, source) < 0.1


def test_refuses_types_that_a_layout_excludes(source: Path, tmp_path: Path) -> None:
    quantize_smoothquant(source, tmp_path / "w8a8", SmoothQuantSettings(), tiny_windows(2, 16), context=Context())
    with pytest.raises(Incompatible, match="int8 or int8-static") as error:
        check_onnx(open_checkpoint(tmp_path / "w8a8"), OnnxSettings(dtype="float32"))
    assert error.value.key == "dtype"
    quantize_gptq(source, tmp_path / "gptq", GPTQSettings(bits=3, group_size=32), tiny_windows(2, 16), context=Context())
    with pytest.raises(Incompatible, match="3 bits") as error:
        check_onnx(open_checkpoint(tmp_path / "gptq"), OnnxSettings(target="onnxruntime", dtype="int4"))
    assert error.value.key == "dtype"


@pytest.mark.slow
def test_an_untied_head_is_rounded_alone(tmp_path: Path) -> None:
    untied = tiny_checkpoint(tmp_path / "model", "qwen2", layers=1, tied=False)
    export_onnx(untied, tmp_path / "out", OnnxSettings(dtype="int8", head_type="int8"), context=Context())
    types = {name: array.dtype for name, array in constants(tmp_path / "out").items() if array.size == 320 * 64}
    assert types == {"model.embed_tokens.weight": np.float32, "lm_head.weight_codes": np.int8}
    assert kl(tmp_path / "out", untied) < 0.1


@pytest.mark.slow
def test_the_trace_of_w8a8_has_no_rounding(source: Path, tmp_path: Path) -> None:
    quantize_smoothquant(source, tmp_path / "w8a8", SmoothQuantSettings(), tiny_windows(2, 16), context=Context())
    graph = trace_generation(load_model(tmp_path / "w8a8", inputs_rounded=False))
    assert not {"Round", "Clip", "Abs"} & {node.op_type for node in graph.graph}
