"""Width pruning against the original model with the same neurons silenced."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compression.checkpoint import open_checkpoint
from compression.context import Context
from compression.errors import Incompatible
from compression.loading import load_model
from compression.pruning import pruned_width
from compression.pruning.width import neuron_norms, prune_width, strongest
from compression.quantization.gptq import quantize_gptq
from tests.tiny import tiny_checkpoint, tiny_windows


def test_norms_are_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(*shape, generator=generator) for shape in ((6, 4), (6, 4), (4, 6)))
    for j, norm in enumerate(neuron_norms(gate, up, down)):
        weights = [*gate[j].tolist(), *up[j].tolist(), *down[:, j].tolist()]
        assert float(norm) == pytest.approx(sum(w * w for w in weights) ** 0.5, rel=1e-12)


def test_of_equal_neurons_the_first_stay() -> None:
    assert strongest(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]


@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_the_pruned_model_is_the_original_with_neurons_silenced(tmp_path: Path, mlp_bias: bool, tied: bool) -> None:
    source = tiny_checkpoint(tmp_path / "in", mlp_bias=mlp_bias, tied=tied)
    warnings: list[str] = []
    metrics = prune_width(source, tmp_path / "out", keep=0.6, context=Context(warn=warnings.append))
    assert metrics["kept_ratio"] == 0.5  # 76.8 of 128 neurons, the nearest multiple of 32 is 64
    assert metrics["intermediate_size"] == 64
    assert "no multiple of 256" in warnings[0]
    kept = load_file(tmp_path / "out" / "kept.safetensors")
    silenced = load_model(source)
    for index in range(2):
        neurons = kept[f"model.layers.{index}.mlp.down_proj"]
        assert neurons.dtype == torch.int32
        assert neurons.tolist() == sorted(set(neurons.tolist()))
        assert len(neurons) == 64
        down = silenced.get_submodule(f"model.layers.{index}.mlp.down_proj").weight
        gone = torch.ones(128, dtype=torch.bool)
        gone[neurons.long()] = False
        down.data[:, gone] = 0
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)  # plain transformers
    with torch.no_grad():
        torch.testing.assert_close(pruned(tiny_windows()).logits, silenced(tiny_windows()).logits, rtol=1e-4, atol=1e-4)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert after.config == before.config | {"intermediate_size": 64}
    assert metrics["parameters_ratio"] == pytest.approx(
        sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in silenced.parameters()), rel=1e-9
    )


def test_a_width_k_quants_take_gives_no_warning(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", intermediate=512, layers=1)
    warnings: list[str] = []
    assert prune_width(source, tmp_path / "out", keep=0.5, context=Context(warn=warnings.append))["kept_ratio"] == 0.5
    assert warnings == []


@given(st.integers(32, 20000), st.floats(0.001, 1.0), st.integers(1, 512))
def test_planned_widths(width: int, keep: float, multiple_of: int) -> None:
    if multiple_of > width:
        with pytest.raises(Incompatible):
            pruned_width(width, keep, multiple_of)
        return
    planned = pruned_width(width, keep, multiple_of)
    assert planned % multiple_of == 0
    assert multiple_of <= planned <= width
    reachable = range(multiple_of, width + 1, multiple_of)
    assert abs(planned - width * keep) <= min(abs(other - width * keep) for other in reachable) + 1e-6


@pytest.mark.parametrize(
    ("keep", "multiple_of", "key"), [(0.0, 32, "keep"), (1.5, 32, "keep"), (0.5, 0, "multiple_of"), (0.5, 256, "multiple_of")]
)
def test_what_fits_no_width_is_refused(tmp_path: Path, checkpoint: Path, keep: float, multiple_of: int, key: str) -> None:
    with pytest.raises(Incompatible) as refused:
        prune_width(checkpoint, tmp_path / "out", keep=keep, multiple_of=multiple_of, context=Context())
    assert refused.value.key == key
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    quantize_gptq(checkpoint, tmp_path / "q", tiny_windows(2), group_size=32, context=Context())
    with pytest.raises(Incompatible, match="takes a dense checkpoint"):
        prune_width(tmp_path / "q", tmp_path / "out", keep=0.5, context=Context())
