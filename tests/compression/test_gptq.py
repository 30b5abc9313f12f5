"""GPTQ against the optimal update solved from scratch in float64, and its behaviour on whole checkpoints."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from compression.calibration.second_order import inverse_factor
from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.layouts import read_quantized_linears
from compression.checkpoints.loading import load_model, save_model
from compression.checkpoints.quantization_config import WeightScheme
from compression.context import Context
from compression.errors import Incompatible
from compression.quantization.gptq import column_order, gptq, quantize_gptq
from compression.quantization.grid import Grid, fit_grid
from compression.quantization.settings import GPTQSettings
from tests.tiny import tiny_windows


def layer(rows: int = 6, width: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A random weight, and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return torch.randn(rows, width, generator=generator), x.T @ x / len(x)


def round_and_solve(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, order: list[int], damp_percent: float) -> torch.Tensor:
    """Round a column, then set all that follow to the minimum of (w − w₀)H(w − w₀)ᵀ given those rounded, solved from scratch."""
    h = hessian.double() + damp_percent * hessian.diagonal().mean().double() * torch.eye(len(hessian), dtype=torch.float64)
    original, current = weight.double(), weight.double().clone()
    scales, zeros = (part.double() for part in grid.columns())
    codes = torch.empty_like(current)
    for position, column in enumerate(order):
        codes[:, column] = (current[:, column] / scales[:, column] + zeros[:, column]).round().clamp(0, 2**grid.bits - 1)
        current[:, column] = (codes[:, column] - zeros[:, column]) * scales[:, column]
        done, rest = order[: position + 1], order[position + 1 :]
        shift = (current[:, done] - original[:, done]) @ h[done][:, rest]
        current[:, rest] = original[:, rest] - torch.linalg.solve(h[rest][:, rest], shift.T).T
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("columns_per_update", [3, 64])
def test_codes_are_those_of_the_optimal_update(
    act_order: bool, bits: int, columns_per_update: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compression.quantization.gptq.COLUMNS_PER_UPDATE", columns_per_update)
    weight, hessian = layer()
    grid = fit_grid(weight, WeightScheme(bits, 8), symmetric=True, hessian=hessian)
    order = column_order(hessian) if act_order else None
    factor = inverse_factor(hessian, damp_percent=0.01, order=order)
    assert factor is not None
    codes = gptq(weight, grid, factor, order=order)
    expected = round_and_solve(weight, hessian, grid, order.tolist() if order is not None else list(range(16)), 0.01)
    assert torch.equal(codes.double(), expected)
    assert not torch.equal(codes, grid.quantize(weight))  # it does more than rounding


def test_the_factor_is_that_of_the_inverse() -> None:
    _, hessian = layer()
    factor = inverse_factor(hessian, damp_percent=0.01)
    assert factor is not None
    assert torch.equal(factor, factor.triu())
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(16)
    torch.testing.assert_close(factor.double().T @ factor.double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-5)


def test_a_singular_hessian_has_no_factor() -> None:
    assert inverse_factor(torch.ones(4, 4), damp_percent=0.0) is None
    assert inverse_factor(torch.zeros(4, 4), damp_percent=0.01) is None
    assert inverse_factor(torch.full((4, 4), torch.nan), damp_percent=0.01) is None


def test_a_dead_channel_is_rounded_to_nearest_and_disturbs_no_other() -> None:
    weight, hessian = layer()
    hessian[5], hessian[:, 5] = 0, 0
    grid = fit_grid(weight, WeightScheme(3, 8), symmetric=False, hessian=hessian)
    factor = inverse_factor(hessian, damp_percent=0.01)
    assert factor is not None
    codes = gptq(weight, grid, factor)
    assert torch.equal(codes[:, 5], grid.quantize(weight)[:, 5])
    other = weight.clone()
    other[:, 5] += 0.3
    assert torch.equal(gptq(other, grid, factor)[:, 6:], codes[:, 6:])


def output_error(reference: Path, path: Path, windows: torch.Tensor) -> float:
    with torch.no_grad():
        return float((load_model(path)(windows).logits - load_model(reference)(windows).logits).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_checkpoint_loses_less_than_by_rounding(tmp_path: Path, checkpoint: Path, bits: int, symmetric: bool) -> None:
    windows = tiny_windows(count=32)
    metrics = quantize_gptq(
        checkpoint, tmp_path / "q", GPTQSettings(bits=bits, group_size=32, symmetric=symmetric), windows, context=Context()
    )
    assert metrics == {"fallback_layers": 0.0}
    model = load_model(checkpoint)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            grid = fit_grid(module.weight.data, WeightScheme(bits, 32), symmetric=symmetric, shrinks=(1.0,))
            module.weight.data = grid.dequantize(grid.quantize(module.weight.data))
    save_model(model, tmp_path / "rtn", like=checkpoint)
    assert output_error(checkpoint, tmp_path / "q", windows) < output_error(checkpoint, tmp_path / "rtn", windows)


def test_what_is_written(tmp_path: Path, checkpoint: Path) -> None:
    quantize_gptq(checkpoint, tmp_path / "q", GPTQSettings(group_size=32), tiny_windows(), context=Context())
    after = open_checkpoint(tmp_path / "q")
    assert after.layout == "gptq"
    assert after.config["quantization_config"] == {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
        "damp_percent": 0.01, "lm_head": False, "pack_dtype": "int32",
    }  # fmt: skip
    down = {name.rpartition(".")[2]: (info.dtype, info.shape) for name, info in after.tensors.items() if "layers.1.mlp.down_proj" in name}
    assert down == {"qweight": ("I32", (16, 64)), "qzeros": ("I32", (4, 8)), "scales": ("F16", (4, 64)), "g_idx": ("I32", (128,))}
    layers = dict(read_quantized_linears(tmp_path / "q"))
    assert len(layers) == 14
    assert all(layer.storage_ordered and (layer.zeros == 8).all() for layer in layers.values())
    dense, quantized = load_model(checkpoint), load_model(tmp_path / "q")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(dense.get_parameter(name), quantized.get_parameter(name))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, checkpoint: Path) -> None:
    for name in ("a", "b"):
        quantize_gptq(checkpoint, tmp_path / name, GPTQSettings(group_size=32), tiny_windows(), context=Context())
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_dead_channels_and_singular_hessians_are_counted_and_said(tmp_path: Path, checkpoint: Path) -> None:
    model = load_model(checkpoint)
    model.get_parameter("model.layers.1.input_layernorm.weight").data[3] = 0
    source = tmp_path / "in"
    save_model(model, source, like=checkpoint)
    warnings: list[str] = []
    context = Context(warn=warnings.append)
    assert quantize_gptq(source, tmp_path / "dead", GPTQSettings(group_size=32), tiny_windows(), context=context) == {
        "fallback_layers": 3.0
    }
    assert len(warnings) == 1
    assert "model.layers.1.self_attn.q_proj" in warnings[0]
    warnings.clear()
    one_token = torch.full((1, 1), 5)
    undamped = GPTQSettings(group_size=32).model_copy(update={"damp_percent": 0.0})
    metrics = quantize_gptq(source, tmp_path / "singular", undamped, one_token, context=context)
    assert metrics["fallback_layers"] == 14.0
    assert "cannot be inverted" in warnings[0]


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(Incompatible, match="64 wide; group sizes that divide every layer: 16, 32, 64") as refused:
        quantize_gptq(checkpoint, tmp_path / "q", GPTQSettings(group_size=128), tiny_windows(), context=Context())
    assert refused.value.key == "group_size"
    with pytest.raises(ValidationError, match="2, 3, 4 or 8"):
        GPTQSettings(bits=5)
    assert not (tmp_path / "q").exists()
