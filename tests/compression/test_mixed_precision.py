"""Bits and groups by pattern: what is planned, stored and read again."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.layouts import read_quantized_linears
from compression.checkpoints.loading import load_model
from compression.checkpoints.quantization_config import WeightScheme, layer_scheme, linear_bits, schemes_of
from compression.context import Context
from compression.errors import Incompatible
from compression.quantization.gptq import quantize_gptq
from compression.quantization.rtn import quantize_rtn
from compression.quantization.settings import GPTQSettings, Override, RTNSettings, gptq_config, plan_gptq, plan_schemes
from tests.tiny import tiny_checkpoint, tiny_windows

LAYERS = {
    "model.layers.1.mlp.down_proj": Override(bits=8), "*.down_proj": Override(bits=3, group_size=64),
    "*.v_proj": Override(bits=16), "*.o_proj": Override(group_size=-1),
}  # fmt: skip


def expected(module: str) -> WeightScheme | None:
    if module == "model.layers.1.mlp.down_proj":
        return WeightScheme(8, 32)
    if module.endswith("down_proj"):
        return WeightScheme(3, 64)
    if module.endswith("v_proj"):
        return None
    return WeightScheme(4, -1 if module.endswith("o_proj") else 32)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_layers_get_the_bits_of_the_first_pattern_that_fits(tmp_path: Path, checkpoint: Path, method: str) -> None:
    if method == "rtn":
        quantize_rtn(checkpoint, tmp_path / "q", RTNSettings(group_size=32, layers=LAYERS), context=Context())
    else:
        quantize_gptq(checkpoint, tmp_path / "q", GPTQSettings(group_size=32, layers=LAYERS), tiny_windows(), context=Context())
    result, dense, model = open_checkpoint(tmp_path / "q"), load_model(checkpoint), load_model(tmp_path / "q")
    found = dict(read_quantized_linears(tmp_path / "q"))
    for name in open_checkpoint(checkpoint).linear_tensors():
        module = name.removesuffix(".weight")
        codes = expected(module)
        assert layer_scheme(result.config["quantization_config"], module) == codes
        if codes is None:
            assert module not in found
            assert torch.equal(model.get_parameter(name), dense.get_parameter(name))
        else:
            assert (found[module].bits, found[module].group_size) == (codes.bits, codes.width(dense.get_parameter(name).shape[1]))
            worst = (model.get_parameter(name) - dense.get_parameter(name)).abs().max() / dense.get_parameter(name).abs().max()
            assert worst < (0.01 if codes.bits == 8 else 0.5)
    assert schemes_of(result) == {WeightScheme(8, 32), WeightScheme(3, 64), WeightScheme(4, 32), WeightScheme(4, -1)}
    planned = plan_gptq(open_checkpoint(checkpoint), GPTQSettings(bits=4, group_size=32, symmetric=True, layers=LAYERS))
    stored = sum(info.numel * {"I32": 32, "F16": 16, "F32": 32}[info.dtype] for name, info in result.tensors.items()
                 if any(part in name for part in ("_proj.qweight", "_proj.qzeros", "_proj.scales", "_proj.weight")))  # fmt: skip
    assert linear_bits(planned, float_bits=32) == stored


def test_a_width_that_the_group_does_not_divide(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", intermediate=96)
    with pytest.raises(Incompatible, match=r"mlp.down_proj, which is 96 wide.*on_indivisible: smaller_group"):
        plan_schemes(open_checkpoint(source), bits=4, group_size=64)
    warnings: list[str] = []
    values, context = {"group_size": 64, "on_indivisible": "smaller_group"}, Context(warn=warnings.append)
    assert quantize_rtn(source, tmp_path / "rtn", RTNSettings(**values), context=context) == {"fallback_layers": 2.0}
    assert quantize_gptq(source, tmp_path / "gptq", GPTQSettings(**values), tiny_windows(), context=context)["fallback_layers"] == 2.0
    assert len(warnings) == 4
    for made in ("rtn", "gptq"):
        found = {module: layer.group_size for module, layer in read_quantized_linears(tmp_path / made)}
        assert {module: 32 if "down_proj" in module else 64 for module in found} == found


@given(st.text("ab.*", min_size=1, max_size=6), st.text("ab.", max_size=8))
def test_a_pattern_fits_what_a_shell_would_say(pattern: str, module: str) -> None:
    from fnmatch import fnmatchcase

    config = gptq_config({}, GPTQSettings(bits=4, group_size=32, symmetric=True, layers={pattern: Override(bits=8)}))
    assert (layer_scheme(config, module) == WeightScheme(8, 32)) == fnmatchcase(module, pattern)
