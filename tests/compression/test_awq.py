"""AWQ: folding changes nothing, the search and the clip pay, and what is written."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from compression.calibration.walk import walk
from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.layouts import read_quantized_linears
from compression.checkpoints.loading import load_model, save_model
from compression.checkpoints.quantization_config import WeightScheme
from compression.context import Context
from compression.errors import Incompatible
from compression.quantization.awq import quantize_awq, search_scales
from compression.quantization.grid import fit_grid
from compression.quantization.scaling import scale_pairs
from compression.quantization.settings import AWQSettings
from tests.tiny import tiny_checkpoint, tiny_windows


def outliers(path: Path, like: Path) -> Path:
    """A checkpoint in which a few channels are driven far harder than the others, as in trained models."""
    model = load_model(like)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.data[::9] *= 12
    save_model(model, path, like=like)
    return path


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_moving_scales_leaves_the_block_as_it_was(tmp_path: Path, kv_heads: int) -> None:
    like = tiny_checkpoint(tmp_path / "like", "qwen2", kv_heads=kv_heads)  # qwen2: v has a bias, which is scaled too
    source = open_checkpoint(outliers(tmp_path / "in", like))
    block = next(walk(source, tiny_windows(), context=Context()))
    model = load_model(source.path)
    hidden = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    rotary = model.model.rotary_emb(hidden, torch.arange(8)[None])
    for name, parameter in block.module.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = block.module(hidden, position_embeddings=rotary)
        weights = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
        folded = [pair.consumers for pair in scale_pairs(block, source.family)]
        for pair in scale_pairs(block, source.family):
            pair.fold(torch.rand(pair.layers[0].in_features, generator=torch.Generator().manual_seed(2)) + 0.5)
        torch.testing.assert_close(block.module(hidden, position_embeddings=rotary), before, rtol=1e-4, atol=1e-4)
    assert (("self_attn.o_proj",) in folded) == (kv_heads == 4)
    assert ("mlp.gate_proj", "mlp.up_proj") in folded
    assert not torch.allclose(weights["mlp.up_proj.weight"], block.linear("mlp.up_proj").weight)


def output_loss(weight: torch.Tensor, scales: torch.Tensor, x: torch.Tensor) -> float:
    """Mean squared error of the output after rounding W·diag(s) to nearest, from the inputs themselves, in float64."""
    grid = fit_grid(weight * scales, WeightScheme(4, 16), symmetric=False, shrinks=(1.0,))
    rounded = grid.dequantize(grid.quantize(weight * scales)).double() / scales
    return float(((rounded - weight) @ x.T).square().sum() / len(x))


def test_the_search_finds_scales_that_pay_on_the_inputs_themselves() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 32, generator=generator) * torch.logspace(-1, 1, 32)[torch.randperm(32, generator=generator)]
    weight = torch.randn(24, 32, generator=generator)
    scales = search_scales(weight, x.T @ x / len(x), WeightScheme(4, 16), clip=False)
    assert scales is not None
    assert output_loss(weight, scales, x.double()) < 0.5 * output_loss(weight, torch.ones(32), x.double())


def test_a_checkpoint_loses_less_than_by_rounding_and_less_with_clip(tmp_path: Path, checkpoint: Path) -> None:
    source = outliers(tmp_path / "in", checkpoint)
    windows = tiny_windows(count=32)
    assert quantize_awq(source, tmp_path / "awq", AWQSettings(group_size=32), windows, context=Context())["scaled_pairs"] >= 4
    quantize_awq(source, tmp_path / "unclipped", AWQSettings(group_size=32, clip=False), windows, context=Context())
    model = load_model(source)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            grid = fit_grid(module.weight.data, WeightScheme(4, 32), symmetric=False, shrinks=(1.0,))
            module.weight.data = grid.dequantize(grid.quantize(module.weight.data))
    save_model(model, tmp_path / "rtn", like=source)
    with torch.no_grad():
        expected = load_model(source)(windows).logits
        loss = {
            name: float((load_model(tmp_path / name)(windows).logits - expected).square().mean()) for name in ("awq", "unclipped", "rtn")
        }
    assert loss["awq"] < loss["unclipped"] < loss["rtn"]


def test_what_is_written(tmp_path: Path, checkpoint: Path) -> None:
    for name in ("a", "b"):
        quantize_awq(checkpoint, tmp_path / name, AWQSettings(group_size=32), tiny_windows(), context=Context())
    after = open_checkpoint(tmp_path / "a")
    assert after.layout == "awq"
    assert after.config["quantization_config"] == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True, "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    down = {name.rpartition(".")[2]: (info.dtype, info.shape) for name, info in after.tensors.items() if "layers.1.mlp.down_proj" in name}
    assert down == {"qweight": ("I32", (128, 8)), "qzeros": ("I32", (4, 8)), "scales": ("F16", (4, 64))}
    assert all(layer.storage_ordered for _, layer in read_quantized_linears(tmp_path / "a"))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_what_does_not_fit_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ValidationError, match="bits"):
        AWQSettings(bits=3)
    with pytest.raises(Incompatible, match="group sizes that divide"):
        quantize_awq(checkpoint, tmp_path / "q", AWQSettings(), tiny_windows(), context=Context())
