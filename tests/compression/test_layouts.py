"""The on-disk layouts against big integers and ONNX Runtime GenAI's readers (GPTQModel's: test_gptqmodel.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.layouts import QuantizedLinear, awq_tensors, gptq_tensors, pack, read_quantized_linears, unpack
from compression.checkpoints.quantization_config import WeightScheme
from compression.context import Context
from compression.errors import Incompatible, UnusableModel
from compression.quantization.awq import quantize_awq
from compression.quantization.gptq import quantize_gptq
from compression.quantization.grid import Grid, diagonal_blocks, fit_grid
from compression.quantization.rounding import quantized_linear
from compression.quantization.settings import AWQSettings, GPTQSettings, plan_schemes
from tests.tiny import tiny_windows


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 3))
def test_packed_words_are_one_stream_of_bits(data: st.DataObject, bits: int, rows: int, runs: int) -> None:
    width = 32 * runs
    codes = [data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=width, max_size=width)) for _ in range(rows)]
    words = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    for row, packed in zip(codes, words, strict=True):
        stream = sum(code << (bits * position) for position, code in enumerate(row))
        assert packed.numpy().astype("<i4").tobytes() == stream.to_bytes(width * bits // 8, "little")
    assert torch.equal(unpack(words, bits), torch.tensor(codes, dtype=torch.uint8))


def test_codes_that_fill_no_whole_word_are_refused() -> None:
    with pytest.raises(ValueError, match="12 codes of 4 bits"):
        pack(torch.zeros(1, 12, dtype=torch.uint8), 4)


def random_layer(bits: int = 4, out: int = 16, width: int = 64, group_size: int = 32) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (out, width), generator=generator, dtype=torch.uint8)
    scales = torch.rand(out, width // group_size, generator=generator).half()
    zeros = torch.randint(1, 2**bits, scales.shape, generator=generator, dtype=torch.uint8)
    return QuantizedLinear(codes, scales, zeros, bits, group_size)


def test_gptq_stores_zeros_minus_one_and_codes_along_the_input() -> None:
    layer = random_layer()
    tensors = gptq_tensors(layer)
    for o in range(16):
        for i in range(64):
            assert int(tensors["qweight"][i // 8, o]) >> (4 * (i % 8)) & 15 == int(layer.codes[o, i])
            assert int(tensors["g_idx"][i]) == i // 32
        for g in range(2):
            assert (int(tensors["qzeros"][g, o // 8]) >> (4 * (o % 8)) & 15) + 1 == int(layer.zeros[o, g])
            assert tensors["scales"][g, o] == layer.scales[o, g]


def test_awq_stores_eight_outputs_a_word_in_its_own_order() -> None:
    layer = random_layer()
    tensors = awq_tensors(layer)
    for place, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        for i in range(64):
            assert int(tensors["qweight"][i, 1]) >> (4 * place) & 15 == int(layer.codes[8 + column, i])
        assert int(tensors["qzeros"][1, 0]) >> (4 * place) & 15 == int(layer.zeros[column, 1])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.floats(1e-9, 1e3))
def test_a_grid_holds_every_weight_within_half_a_step(seed: int, bits: int, symmetric: bool, size: float) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * size
    weight[0] = 0
    weight[1] = weight[1].abs()  # one-sided groups
    grid = fit_grid(weight, WeightScheme(bits, 16), symmetric=symmetric, shrinks=(1.0,))
    assert torch.equal(grid.scales, grid.scales.half().float())
    assert (grid.scales > 0).all()
    assert ((grid.zeros >= 1) & (grid.zeros <= 2**bits - 1) & (grid.zeros == grid.zeros.round())).all()
    scales, _ = grid.columns()
    error = (grid.dequantize(grid.quantize(weight)) - weight).abs()
    # one step where the range is cut: zeros start at 1, the symmetric range lacks its last half step, float16 rounds the scale
    slack = (2**bits - 1) * (2**-10 * scales + 2.0**-24)
    assert (error <= scales * 1.0 + slack).all()
    codes = grid.quantize(weight)
    interior = (codes > 0) & (codes < 2**bits - 1)
    assert (error[interior] <= (0.5001 * scales + 1e-12)[interior]).all()


def test_shrinking_minimizes_the_output_error_of_each_group() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    hessian, weight = x.T @ x / len(x), torch.randn(8, 32, generator=generator)
    shrinks = (1.0, 0.9, 0.8, 0.7)
    fitted = fit_grid(weight, WeightScheme(3, 16), symmetric=False, hessian=hessian, shrinks=shrinks)
    for row in range(8):
        for group, part in enumerate((slice(0, 16), slice(16, 32))):
            inputs = x[:, part].double()
            losses = []
            for grid in (fitted, *(fit_grid(weight * s, WeightScheme(3, 16), symmetric=False, shrinks=(1.0,)) for s in shrinks)):
                delta = (grid.dequantize(grid.quantize(weight)) - weight)[row, part].double()
                losses.append(float((inputs @ delta).square().mean()))
            assert losses[0] == pytest.approx(min(losses[1:]), rel=1e-4), (row, group)


def test_inputs_that_overflowed_leave_the_plain_grid() -> None:
    weight, broken = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), torch.full((32, 32), torch.nan)
    plain = fit_grid(weight, WeightScheme(4, 16), symmetric=True, shrinks=(1.0,))
    assert torch.equal(fit_grid(weight, WeightScheme(4, 16), symmetric=True, hessian=broken).scales, plain.scales)


def test_diagonal_blocks() -> None:
    hessian = torch.arange(36).reshape(6, 6)
    assert diagonal_blocks(hessian, 3).tolist() == [hessian[:3, :3].tolist(), hessian[3:, 3:].tolist()]


def test_stacked_rows_come_apart() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    grid: Grid = fit_grid(weight, WeightScheme(4, 16), symmetric=True)
    codes = grid.quantize(weight)
    assert torch.equal(quantized_linear(codes, grid, rows=slice(3, 8)).dequantize(), grid.dequantize(codes)[3:])


def test_group_sizes_are_checked_without_loading_anything(checkpoint: Path) -> None:
    source = open_checkpoint(checkpoint)
    plan_schemes(source, bits=4, group_size=32)
    for group_size in (0, 48, 128):
        with pytest.raises(Incompatible, match=r"self_attn.q_proj, which is 64 wide; .*: 16, 32, 64") as refused:
            plan_schemes(source, bits=4, group_size=group_size)
        assert refused.value.key == "group_size"


def genai_layers(path: Path, method: str):
    """The layers as ONNX Runtime GenAI's model builder reads them: (path, codes, scales, zeros)."""
    reason = "onnxruntime-genai is not installed: its reader judged nothing"
    loaders = pytest.importorskip("onnxruntime_genai.models.loaders.quant_model", reason=reason)
    source = open_checkpoint(path)
    model = loaders.QuantModel.from_pretrained(
        method, input_path=path, quant_attrs={"config": source.config["quantization_config"], "use_g_idx": False}, q_size=64, kv_size=32,
        intermediate_size=source.intermediate_size, num_layers=source.num_layers,
    )  # fmt: skip
    for index, block in enumerate(model.layers):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            module = block
            for part in name.split("."):
                module = getattr(module, part)
            low_first = np.stack([module.qweight.numpy() & 15, module.qweight.numpy() >> 4], -1)
            zeros = np.stack([module.qzeros.numpy() & 15, module.qzeros.numpy() >> 4], -1)
            yield f"model.layers.{index}.{name}", low_first.reshape(low_first.shape[0], -1), module.scales.numpy(), zeros.reshape(-1)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_genai_reads_the_same_codes(tmp_path: Path, checkpoint: Path, method: str) -> None:
    if method == "gptq":
        quantize_gptq(checkpoint, tmp_path / "q", GPTQSettings(group_size=32, symmetric=False), tiny_windows(), context=Context())
    else:
        quantize_awq(checkpoint, tmp_path / "q", AWQSettings(group_size=32), tiny_windows(), context=Context())
    ours = dict(read_quantized_linears(tmp_path / "q"))
    seen = 0
    for name, codes, scales, zeros in genai_layers(tmp_path / "q", method):
        assert (codes == ours[name].codes.numpy()).all(), name
        assert (scales.reshape(ours[name].scales.shape) == ours[name].scales.numpy()).all(), name
        assert (zeros.reshape(ours[name].zeros.shape) == ours[name].zeros.numpy()).all(), name
        seen += 1
    assert seen == 8


def test_a_dense_checkpoint_has_no_quantized_layers(checkpoint: Path) -> None:
    with pytest.raises(UnusableModel, match="is dense"):
        next(read_quantized_linears(checkpoint))
