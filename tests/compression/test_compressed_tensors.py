"""The W8A8 and fp8 layouts against formulas in float64, and against the compressed-tensors package."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.compressed_tensors import round_inputs, round_tokens, round_weight
from compression.checkpoints.loading import load_model
from compression.checkpoints.schemes import Scheme
from compression.context import Context
from compression.errors import UnusableModel
from compression.quantization.fp8 import quantize_fp8
from compression.quantization.settings import FP8Settings, SmoothQuantSettings
from compression.quantization.smoothquant import quantize_smoothquant
from tests.tiny import tiny_checkpoint, tiny_windows

W8A8, FP8, FP8_TENSOR = Scheme("int"), Scheme("float"), Scheme("float", "tensor")


# 4 bits of exponent with bias 7, 3 of mantissa; the largest pattern is NaN, so 448 is the largest number (arXiv 2209.05433, table 1)
E4M3_POSITIVE = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
E4M3 = np.array(sorted({sign * value for sign in (1, -1) for value in E4M3_POSITIVE}))
INT8 = np.arange(-128, 128.0)


def nearest(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    return grid[np.abs(values[..., None] - grid).argmin(-1)]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.sampled_from([W8A8, FP8, FP8_TENSOR]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.floats(1e-4, 50),
)
def test_every_weight_is_the_nearest_on_its_stored_grid(seed: int, scheme: Scheme, dtype: torch.dtype, size: float) -> None:
    weight = (torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    weight[0] = 0
    weight[1] *= 1e-3  # in float16 a scale with few digits left
    layer = round_weight(weight, scheme, dtype=dtype, name="w")
    assert layer.scale.dtype == dtype and layer.scale.shape == ((6, 1) if scheme.strategy == "channel" else (1,))
    exact = weight.double().numpy()
    scale = np.broadcast_to(layer.scale.double().numpy(), (6, 1))
    grid = INT8[1:] if scheme.type == "int" else E4M3
    error = np.abs(layer.codes.double().numpy() * scale - exact)
    np.testing.assert_allclose(error, np.abs(nearest(exact / scale, grid) * scale - exact), atol=float(np.abs(exact).max()) * 1e-6)
    largest = np.abs(exact).max(1, keepdims=True) if scheme.strategy == "channel" else np.abs(exact).max(keepdims=True)
    assert (scale * grid.max() >= largest * (1 - 1e-6)).all()  # nothing is clipped
    assert (layer.codes.float()[weight == 0] == 0).all()
    assert torch.equal(layer.dequantize().double(), torch.from_numpy(layer.codes.double().numpy() * scale)) or dtype == torch.float32


def test_a_row_of_zeros_has_a_scale(tmp_path: Path) -> None:
    for scheme in (W8A8, FP8):
        layer = round_weight(torch.zeros(2, 4), scheme, dtype=torch.bfloat16, name="w")
        assert layer.scale.tolist() == [[1.0], [1.0]] and not layer.dequantize().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("scheme", [W8A8, FP8, FP8_TENSOR])
def test_weights_that_are_not_finite_are_refused(bad: float, scheme: Scheme) -> None:
    weight = torch.ones(4, 4)
    weight[2, 1] = bad
    with pytest.raises(UnusableModel, match=r"model\.up\.weight holds values that are not finite"):
        round_weight(weight, scheme, dtype=torch.float32, name="model.up.weight")


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([W8A8, FP8]), st.floats(1e-6, 1e4))
def test_tokens_are_rounded_each_with_its_own_scale(seed: int, scheme: Scheme, size: float) -> None:
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(seed)) * size
    x[0, 1] *= 100
    x[1, 2] = 0
    rounded = round_tokens(x, scheme)
    values = x.double().numpy()
    largest = np.abs(values).max(-1, keepdims=True)
    scale = np.where(largest == 0, 1.0, largest / (255 / 2 if scheme.type == "int" else 448))
    best = np.abs(nearest(values / scale, INT8 if scheme.type == "int" else E4M3) * scale - values)
    assert (np.abs(rounded.double().numpy() - values) <= best + 1e-6 * largest).all()
    assert not rounded[1, 2].any() and rounded.dtype == x.dtype


def test_a_layer_reads_its_input_rounded() -> None:
    layer, x = nn.Linear(16, 4), torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.linear(round_tokens(x, W8A8), layer.weight, layer.bias)
    round_inputs(layer, W8A8)
    assert torch.equal(layer(x), expected)


Write = Callable[[Path, Path], Any]


def smoothquant(source: Path, out: Path) -> None:
    quantize_smoothquant(source, out, SmoothQuantSettings(), tiny_windows(), context=Context())


def fp8(source: Path, out: Path) -> None:
    quantize_fp8(source, out, FP8Settings(), context=Context())


def fp8_tensor(source: Path, out: Path) -> None:
    quantize_fp8(source, out, FP8Settings(strategy="tensor"), context=Context())


@pytest.mark.parametrize("write", [smoothquant, fp8, fp8_tensor])
def test_the_loader_opens_what_the_tensors_spell_and_rounds_inputs(tmp_path: Path, write: Write) -> None:
    source = tiny_checkpoint(tmp_path / "in", "qwen2", layers=1, dtype=torch.bfloat16)  # qwen2 has biases
    write(source, tmp_path / "q")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    model = load_model(tmp_path / "q")
    path = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(path)
    assert torch.equal(layer.weight, stored[f"{path}.weight"].float() * stored[f"{path}.weight_scale"].float())
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1))
    scheme = W8A8 if write is smoothquant else FP8
    assert torch.equal(layer(x), nn.functional.linear(round_tokens(x, scheme), layer.weight))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, stored["model.layers.0.self_attn.q_proj.bias"].float())
    assert not model.lm_head._forward_pre_hooks and torch.equal(model.lm_head.weight, stored["model.embed_tokens.weight"].float())
    with torch.no_grad():
        dense = load_model(source)(tiny_windows()).logits
        error = float((model(tiny_windows()).logits - dense).std())
    assert 0 < error < (0.05 if write is smoothquant else 0.15) * float(dense.std())
    assert {parameter.dtype for parameter in load_model(tmp_path / "q", dtype=None).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("write", [smoothquant, fp8, fp8_tensor])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compressed_tensors_package_opens_the_same_model(tmp_path: Path, write: Write, dtype: torch.dtype) -> None:
    reason = "compressed-tensors is not installed: it judged nothing (pip install compressed-tensors==0.20.0)"
    pytest.importorskip("compressed_tensors", reason=reason)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM

    source = tiny_checkpoint(tmp_path / "in", "qwen2", dtype=dtype)
    write(source, tmp_path / "q")
    ours = load_model(tmp_path / "q")
    config = QuantizationConfig.model_validate(open_checkpoint(tmp_path / "q").config["quantization_config"])
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    assert compressor.can_compress(nn.Linear, scheme)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    layers = [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]
    assert len(layers) == 14
    for layer in layers:
        theirs = compressor.decompress({s: stored[f"{layer}.{s}"] for s in ("weight", "weight_scale")}, scheme)["weight"]
        assert torch.equal(theirs, ours.get_submodule(layer).weight.to(theirs.dtype)), layer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    quantized = {name for name, module in model.named_modules() if getattr(module, "quantization_scheme", None) is not None}
    assert quantized == set(layers)
    with torch.no_grad():
        dense, expected, logits = (m(tiny_windows()).logits for m in (load_model(source), model.eval(), ours))
    noise = float((expected - dense).std())
    assert float((logits - expected).std()) <= 1e-3 * noise  # 0.0 where measured; without rounded inputs 0.7


def change(path: Path, **entries: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= {key: value for key, value in entries.items() if key in ("kv_cache_scheme", "format", "config_groups")}
    group = config["quantization_config"]["config_groups"].get("group_0", {})
    for part in ("weights", "input_activations"):
        group.get(part, {}).update(entries.get(part, {}))
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "entries",
    [
        {"weights": {"strategy": "group", "group_size": 32}},
        {"weights": {"symmetric": False}},
        {"weights": {"num_bits": 4}},
        {"input_activations": {"dynamic": False, "strategy": "tensor"}},
        {"kv_cache_scheme": {"num_bits": 8}},
        {"config_groups": {}},
        {"format": "int-quantized"},
    ],
)
def test_schemes_that_are_not_read_are_refused(tmp_path: Path, checkpoint: Path, entries: dict[str, Any]) -> None:
    fp8(checkpoint, tmp_path / "q")
    change(tmp_path / "q", **entries)
    with pytest.raises(UnusableModel, match="compressed-tensors scheme is not read"):
        load_model(tmp_path / "q")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda tensors, name: tensors.pop(f"{name}.weight_scale"), r"up_proj lacks its weight_scale"),
        (lambda tensors, name: tensors.pop(f"{name}.weight"), r"up_proj lacks its weight$"),
        (lambda tensors, name: tensors.update({f"{name}.weight_scale": torch.ones(2, 1)}), r"with scales \[2, 1\]; its config means"),
        (lambda tensors, name: tensors.update({f"{name}.weight": torch.ones(128, 64, dtype=torch.int8)}), r"a weight I8"),
        (lambda tensors, name: tensors.update({f"{name}.input_scale": torch.ones(1)}), "does not know model.layers.0.mlp.up_proj.input_scale"),
    ],
)  # fmt: skip
def test_damaged_layers_are_refused(tmp_path: Path, checkpoint: Path, spoil: Any, says: str) -> None:
    fp8(checkpoint, tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    spoil(tensors, "model.layers.0.mlp.up_proj")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnusableModel, match=says):
        load_model(tmp_path / "q")
