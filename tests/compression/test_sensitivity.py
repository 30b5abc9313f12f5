"""Sensitivities against layers really rounded, and the budget against all choices."""

from itertools import product
from pathlib import Path

import pytest
import torch

from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.quantization.rtn import quantize_rtn
from compression.quantization.sensitivity import Sensitivity, allocate_bits, measure_sensitivity
from compression.quantization.settings import RTNSettings
from tests.tiny import tiny_windows


def test_errors_are_those_of_outputs(tmp_path: Path, checkpoint: Path) -> None:
    windows, model = tiny_windows(), load_model(checkpoint)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0].detach().double()}))
    with torch.no_grad():
        model(windows)
    found = measure_sensitivity(checkpoint, windows, group_size=32, widths=(3, 8), context=Context())
    for bits in (3, 8):
        quantize_rtn(checkpoint, tmp_path / str(bits), RTNSettings(bits=bits, group_size=32), context=Context())
        rounded = load_model(tmp_path / str(bits))
        for name, layer in found.items():
            before, after = (m.get_parameter(f"{name}.weight").detach().double() for m in (model, rounded))
            expected = (inputs[name] @ (after - before).T).square().sum() / (inputs[name] @ before.T).square().sum()
            assert layer.errors[bits] == pytest.approx(float(expected), rel=1e-3)
            assert layer.weights == before.numel()
    assert len(found) == 14


def test_a_budget_goes_where_it_helps_most() -> None:
    layers = {
        "a": Sensitivity(10, {2: 0.9, 4: 0.2, 8: 0.01}), "b": Sensitivity(10, {2: 0.2, 4: 0.05, 8: 0.001}), "c": Sensitivity(20, {2: 0.5, 4: 0.1, 8: 0.0}),
    }  # fmt: skip
    for average in (2, 3, 4, 5.5, 8):
        chosen = allocate_bits(layers, average)
        assert sum(layers[path].weights * bits for path, bits in chosen.items()) <= average * 40
        error = sum(layers[path].errors[bits] for path, bits in chosen.items())
        choices = [dict(zip(layers, bits, strict=True)) for bits in product((2, 4, 8), repeat=3)]
        best = min(
            sum(layers[p].errors[b] for p, b in c.items())
            for c in choices
            if sum(layers[p].weights * b for p, b in c.items()) <= average * 40
        )
        assert error <= best * 1.5
    assert allocate_bits(layers, 3) == {"a": 4, "b": 4, "c": 2}
    with pytest.raises(ValueError, match="below the fewest"):
        allocate_bits(layers, 1)
